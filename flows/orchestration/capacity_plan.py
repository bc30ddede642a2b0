"""The capacity plan that `unclip run RECIPE --dry-run` prints: memory, FLOPs, time and storage.

Counts come from the recipe and from models on the meta device; throughput and the number of pairs
are passed in. Reads no data.
"""

from typing import TYPE_CHECKING, TypedDict, final

from flows.config.recipe_file import find_recipe

if TYPE_CHECKING:
    from flows.config.run_config import RunConfig
    from training.jobs.cost_model import Cost, TrainingNeed
    from training.sections.loop_section import LoopConfig

STORED_BYTES_PER_PIXEL = 0.4
"""Approximate size of a photograph stored as JPEG of quality 95; PNG drawings take less."""


PUBLISHED = {
    "prior": 1_000_000_000,
    "decoder": 3_500_000_000,
    "upsampler": 700_000_000,
    "upsampler_2": 300_000_000,
}
"""Parameters of the paper's models (Ramesh et al. 2022, table 3); 1B is either prior's."""
PAPERS = ("paper", "paper_autoregressive")


@final
class StorageNeed(TypedDict):
    """The needs of a stage that trains nothing."""

    storage_bytes: int


def published(recipe: str) -> dict[str, int]:
    """Return the paper's parameter counts by stage if the recipe transcribes the paper, else {}."""
    return PUBLISHED if find_recipe(recipe).stem in PAPERS else {}


def capacity(
    config: "RunConfig", tflops: float | None, pairs: int | None
) -> "dict[str, TrainingNeed | StorageNeed]":
    """Return the plan by stage.

    `tflops` is the throughput of one worker in training, in TFLOP/s, and `pairs` the number of
    pairs in the data set. With a pretrained CLIP, whose sizes are known only after it is read, only
    the up-samplers are counted.
    """
    from training.jobs import cost_model as costs

    rate = tflops * 1e12 if tflops else None
    needs: dict[str, TrainingNeed | StorageNeed] = {
        name: costs.need(cost, section, workers, rate)
        for name, (section, cost, workers) in _trained(config).items()
    }
    if pairs and not config.clip.pretrained:
        dim = config.clip.embed_dim
        needs["embed"] = {"storage_bytes": pairs * 2 * dim * 2}  # image and text, float16
        needs["index"] = {"storage_bytes": pairs * 2 * dim}  # image and text, 8 bits a dimension
    if pairs:
        side_px = config.data.image_size_px
        needs["ingest"] = {"storage_bytes": int(pairs * side_px**2 * STORED_BYTES_PER_PIXEL)}
    return needs


def _trained(config: "RunConfig") -> "dict[str, tuple[LoopConfig, Cost, int]]":
    """Return section, cost and number of workers of every trained stage."""
    from training.jobs import cost_model as costs

    clip, prior, decoder, cluster = config.clip, config.prior, config.decoder, config.cluster
    vocabulary, context = config.tokenizer.vocab_size, config.tokenizer.context
    dim = clip.embed_dim
    trained: dict[str, tuple[LoopConfig, Cost, int]] = {}
    if not clip.pretrained:
        clip_cost = costs.clip_cost(clip, vocabulary, context)
        prior_cost = costs.prior_cost(prior, dim, vocabulary, context)
        decoder_cost = costs.decoder_cost(decoder, dim, vocabulary, context)
        trained["clip"] = (clip, clip_cost, cluster.clip_workers)
        trained["prior"] = (prior, prior_cost, cluster.prior_workers)
        trained["decoder"] = (decoder, decoder_cost, cluster.decoder_workers)
    for name, section in (("upsampler", config.upsampler), ("upsampler_2", config.upsampler_2)):
        if section:
            trained[name] = (section, costs.upsampler_cost(section), cluster.upsampler_workers)
    return trained


def described(need: "TrainingNeed | StorageNeed") -> str:
    """Format one stage's plan as one line."""
    if "parameters" not in need:
        return f"storage {size(need['storage_bytes'])}"
    parts = [
        f"{need['flops_per_image'] / 1e9:,.1f} GFLOP an image",
        f"state {size(need['state_bytes_per_worker'])}{', sharded,' if need['sharded'] else ''} "
        f"and activations {size(need['activation_bytes_per_image'])} an image on each of "
        f"{need['workers']} worker(s), {need['batch_per_worker']} images each: "
        f"{size(need['memory_bytes_per_worker'])} together",
        f"checkpoint {size(need['checkpoint_bytes'])}",
    ]
    if "days" in need:
        parts.append(
            f"{need['images_per_s']:,.1f} images/s, "
            f"{need['days']:,.2f} days for {need['images']:,} images"
        )
    return "; ".join(parts)


def size(count: float) -> str:
    """Format a number of bytes with a unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
