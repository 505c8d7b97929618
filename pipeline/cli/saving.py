"""`save-model`: a model as a folder that other servers load."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import output
from pipeline.cli.models import Weights, save_model_folder


def save_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, hub name, .gguf file or packaged name.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.")],
    weights: Annotated[
        Weights, typer.Option(help="The values of the int8 rows that prompts are tuned on, or those that are stored.")
    ] = "int8",
) -> None:
    """Write a model as a folder that vLLM loads.

    It holds the configuration, the tokenizer and float32 weights.

    A GGUF file and its folder have two fingerprints. State in the bank that they are one model before you serve it.

    Examples:

    \b
    promptbank save-model smollm2-135m ./smollm2
    promptbank same-backbone smollm2-135m ./smollm2
    """
    with output.progress(f"reading the weights of {model}"):
        save_model_folder(model, destination, weights)
    output.write_line(f"wrote {model} to {destination}, its weights {output.quoted(weights)}")
    output.note(f"state that it is the bank's model: promptbank same-backbone {model} {destination}")
