"""Prints the table of decoder families in docs/models.md, measured anew on tiny random models.

PYTHONPATH=. python docs/print_families.py > /tmp/table.md
"""

import tempfile
from pathlib import Path

import torch
import transformers

from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.proof import Proof
from tests.families import DECODERS, make_decoder


def main() -> None:
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print(f"Measured with transformers {transformers.__version__}.\n")
    print("| family | rows run | kept | likelihood off, nats | gradient off |\n|---|---|---|---|---|")
    for name, family in DECODERS.items():
        with tempfile.TemporaryDirectory() as folder:
            files = find_model(str(make_decoder(Path(folder), family)))
            backbone = host_backbone(
                files,
                read_config(files),
                int8=False,
                dtype=torch.float32,
                device=torch.device("cpu"),
                sharded=False,
            )
        off = backbone.proof.differences[backbone.way]
        kept = "prompts, rows" if backbone.way == "packed" else _kept(backbone.proof)
        print(f"| {name} | {backbone.way} | {kept} | {off.likelihood:.0e} | {off.gradient:.0e} |")


def _kept(proof: Proof) -> str:
    return ", ".join(["prompts"] * proof.keeps_prompts + ["rows"] * proof.keeps_rows) or "nothing"


if __name__ == "__main__":
    main()
