"""The settings of `jobs/adapt_backbone.py`: a file of its own, which shares blocks with a run's settings."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.settings.fields import Address, Count, Paths, SettingsModel
from pipeline.settings.models import ClusterSettings, RunSettings
from pipeline.settings.tasks import OptimizerSettings


class AdaptedModelSettings(SettingsModel):
    """An encoder-decoder: one whose weights are trained further, or a fresh one."""

    path: Address | None = None
    """The model folder whose weights are trained further."""
    fresh: bool = False
    """Take only the configuration and the tokenizer from `path`; weights are drawn anew, by `run.seed`."""
    config: dict[str, Any] | None = None
    """The configuration of a fresh model, such as `{model_type: t5, d_model: 64, num_layers: 2, …}`; `tokenizer` gives
    its vocabulary."""
    tokenizer: Address | None = None
    """The folder (or packaged model) whose tokenizer a model from `config` gets."""
    sentinels: int = Field(100, ge=1, le=1_000_000)
    """Sentinel tokens (`<extra_id_0>`, …) that a fresh model's tokenizer has at least; missing ones are added."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations; the optimizer works in float32. `auto`: float32 on a CPU, bfloat16 on a GPU."""

    @property
    def is_fresh(self) -> bool:
        return self.fresh or self.config is not None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either 'path' (a model folder) or 'config' (of a fresh model), and not both")
        if (self.config is None) != (self.tokenizer is None):
            raise ValueError("'config' and 'tokenizer' (a folder with one) go together")
        return self


class TextSettings(SettingsModel):
    train: Paths
    """Parquet files of plain text: a path, folder, glob or object-store URI, or a list of them."""
    text: str = "{text}"
    """Template of a document; `{column}` stands for a column of the corpus."""
    max_bad_rows: float = Field(0.05, ge=0, le=1)
    """Largest share of null and empty rows that is dropped without refusing the corpus."""


class ObjectiveSettings(SettingsModel):
    """The training objective on a stretch of text: Lester et al. (2021), section 3.2; Raffel et al. (2020), 3.3."""

    name: Literal["prefix_lm", "span_corruption"] = "prefix_lm"
    """`prefix_lm` (LM adaptation): the beginning of a stretch goes in, the rest comes out. `span_corruption` (T5's own
    pre-training): spans are replaced by sentinels in the input and come out."""
    noise_density: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens in corrupted spans."""
    mean_span: float = Field(3.0, ge=1)
    """Mean tokens of a corrupted span."""
    sentinels_in_targets: bool = True
    """Whether a target names each span by its sentinel, as T5's do, or is the spans' tokens alone."""


class WeightOptimizerSettings(OptimizerSettings):
    """How the model's own weights are updated."""

    lr: float = Field(1e-3, gt=0)
    """The learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up: it stays, or it falls to 0 at `steps`."""


class AdaptationSettings(SettingsModel):
    run: RunSettings = RunSettings(name="adaptation")
    model: AdaptedModelSettings
    corpus: TextSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    cluster: ClusterSettings = ClusterSettings()
    optimizer: WeightOptimizerSettings = WeightOptimizerSettings(weight_decay=0.0)
    """Adafactor's rate is relative to the size of each parameter, as T5 was trained."""
    tokens: int = Field(512, ge=2, le=10**7)
    """Length of the stretches of text that examples are made of."""
    batch_size: int = Field(32, ge=1, le=10**7)
    """Examples a step, over all ranks."""
    steps: Count
    save_at: tuple[int, ...] = ()
    """Steps after which the model is saved as a folder; 0 is the start, and the last step is always saved."""

    @property
    def kept_steps(self) -> tuple[int, ...]:
        return tuple(sorted({*self.save_at, self.steps}))

    @model_validator(mode="after")
    def _saves_what_is_reached(self) -> Self:
        beyond = [step for step in self.save_at if not 0 <= step <= self.steps]
        if beyond:
            raise ValueError(f"save_at: step {beyond[0]} is not within 0 to {self.steps} ('steps')")
        return self

    @model_validator(mode="after")
    def _has_sentinels_enough(self) -> Self:
        spans = max(1, round(round(self.tokens * self.objective.noise_density) / self.objective.mean_span))
        if self.objective.name == "span_corruption" and self.model.is_fresh and spans > self.model.sentinels:
            raise ValueError(
                f"{self.tokens} tokens have {spans} corrupted spans, more than model.sentinels {self.model.sentinels}; "
                "raise it, or lower 'tokens'"
            )
        return self
