"""The content of report.json as types; report.schema.json is its definition for other readers.

The types of figures stand beside the functions that measure them, those of sections in
indexing.report.sections. Holds no functions, reads and writes nothing.
"""

from typing import Any, NotRequired, TypedDict, final

from indexing.metrics.bootstrap import Figure
from indexing.metrics.clip_score import ClipScores
from indexing.metrics.retrieval import BothWays
from indexing.metrics.zero_shot import Classification
from indexing.report.sections import ReportSection
from infra.storage.manifest_schema import SampleCounts


class RunDescription(TypedDict):
    """What the caller of the evaluation says of the run."""

    config: dict[str, Any]
    """The resolved recipe, by section."""
    name: NotRequired[str]


class RunHistory(RunDescription):
    """When and with which packages a run was made."""

    started: str | None
    """UTC, ISO 8601: the earliest start of a stage."""
    finished: str | None
    seconds: float
    """Sum over all stages."""
    packages: dict[str, list[str]]
    """All versions by package."""


class RunFacts(RunHistory):
    """The report's `run`."""

    data: dict[str, dict[str, int]]
    """Numbers of pairs by split: all, and those whose picture or concept is in training."""
    licences: dict[str, int]
    """Number of pairs by licence."""


class MetricsRow(TypedDict, total=False):
    """A row of metrics.jsonl, as far as the report reads it."""

    images_seen: int
    loss: float


class LastLoss(TypedDict):
    """The mean loss of the last n rows of metrics.jsonl."""

    value: float
    n: int
    images_seen: int


class StageEntry(SampleCounts):
    """One of the report's `stages`."""

    stage: str
    key: str
    inputs: dict[str, str]
    """Keys of its input stages."""
    started: str
    finished: str
    seconds: float
    bytes: int
    more: dict[str, object]
    """Other counts of the stage."""
    loss: NotRequired[LastLoss]
    curve: NotRequired[list[tuple[float, float]]]
    """Images seen and loss; neighbouring points are averaged."""


@final
class Unmeasured(TypedDict):
    """Stands in place of figures that could not be measured; `note` says why."""

    n: int
    classes: NotRequired[int]
    note: str


class ExampleResult(TypedDict):
    """A picture that was retrieved for a caption."""

    picture: str
    caption: str
    is_right: bool


class Example(TypedDict):
    """A caption and the pictures nearest to it."""

    caption: str
    results: list[ExampleResult]


class Retrieval(BothWays):
    """A split's recall by each picture's first caption, and by all its captions."""

    all_captions: BothWays
    examples: list[Example]


class Neighbour(TypedDict):
    """The training picture that is nearest to a sample; `value` is its cosine or RMS difference."""

    value: float
    key: str
    caption: str
    style: str
    licence: str
    url: str
    picture: str


class NearestPictures(TypedDict):
    """A sample's nearest training picture by embedding and by pixels."""

    cosine: Neighbour
    rms: Neighbour


class Sample(TypedDict):
    """One generated picture."""

    picture: str
    clip_score: float
    nearest: NotRequired[NearestPictures]


class PromptSamples(TypedDict):
    """A prompt and the pictures that were generated from it."""

    prompt: str
    is_training_caption: bool
    samples: list[Sample]


class BesideUnseen(TypedDict):
    """Mean distances to the nearest training picture: of samples and of unseen real pictures."""

    samples: Figure
    unseen: Figure


class NearestDistances(TypedDict, total=False):
    """Mean distances to the training pictures; empty where there are none."""

    cosine: BesideUnseen
    rms: BesideUnseen


class NearestTraining(NearestDistances):
    """The comparison of generated pictures with training pictures."""

    pixel_pool: int
    """Training pictures that were compared pixel by pixel."""
    training_pictures: int


class GeneratedPictures(ClipScores):
    """Generated pictures, their scores and their nearest training pictures."""

    n: int
    seed: int
    side_px: int
    real_pairs: Figure
    nearest_training: NearestTraining
    sheet: str
    """File name in the report's folder."""
    prompts: list[PromptSamples]


class Generation(GeneratedPictures):
    """The report's `generation`."""

    steps: int | None
    """None: the decoder's own number."""
    guidance: float | None


class Report(TypedDict):
    """The content of report.json."""

    run: RunFacts
    stages: list[StageEntry]
    zero_shot: dict[str, dict[str, Classification | Unmeasured]]
    """By split, then by kind of class."""
    retrieval: dict[str, Retrieval | Unmeasured]
    """By split."""
    generation: Generation
    sections: list[ReportSection]
    """Further sections, in the order of the page."""
