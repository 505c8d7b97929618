"""Ray's report that its memory monitor killed a process, a paragraph with a table and advice, as one clause."""

import re

_NODE = re.compile(r"Memory on the node \(IP: ([^,)]+)[^)]*\) was ([\d.]+)\s?GB used / ([\d.]+)\s?GB limit")
_PROCESS = re.compile(r"(?:task name=([^,\n]*),[^\n]*?)?pid=(\d+), actual memory used=([\d.]+)\s?GB")


MORE_MEMORY = "give the node more memory, run less beside it, or raise RAY_memory_usage_threshold"
"""What helps whoever took the memory; a caller puts before it what its own processes could do with less."""


def memory_kill(text: str) -> str | None:
    """Which process was killed, and how much memory was in use; None for a text on anything else."""
    if "running low on memory" not in text:
        return None
    process, node = _PROCESS.search(text), _NODE.search(text)
    who = "a process"
    if process:
        name = f"{process[1].strip()}, " if process[1] and process[1].strip() else ""
        who = f"process {process[2]} ({name}{process[3]} GB)"
    used = f"{node[2]} of {node[3]} GB were in use on node {node[1]}" if node else "its node ran low on memory"
    return f"Ray ended {who} because {used}"
