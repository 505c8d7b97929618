"""Load on a service, as a process of its own: `load.py URL SECONDS THREADS` prints one JSON line a request."""

import json
import sys
import threading
import time

import httpx

QUESTIONS = [
    ("classify", "film", "good film"),
    ("generate", "open", "bad food with music"),
    ("classify", "colour", "the red story"),
]


def ask(url: str, until: float, first: int, lines: list[str]) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(first, 10**9):
            kind, task, text = QUESTIONS[number % len(QUESTIONS)]
            body = {"rows": [{"task": task, "text": text}]}
            try:
                reply = client.post(f"/v1/{kind}", json=body | ({"max_new_tokens": 4} if kind == "generate" else {}))
                told = {"status": reply.status_code, **reply.json()}
            except (httpx.HTTPError, ValueError) as error:
                told = {"status": 0, "error": repr(error)}
            lines.append(json.dumps({"question": number % len(QUESTIONS), **told}))
            if time.time() > until:
                return


def main(url: str, seconds: float, threads: int) -> None:
    lines: list[str] = []
    until = time.time() + seconds
    workers = [threading.Thread(target=ask, args=(url, until, number, lines)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
