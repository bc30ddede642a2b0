"""The report's section on the trained decoder.

Holds the likelihood and the reconstruction of held-out images, and pictures of the latents x_t.
`training.generation` measures and draws; `indexing.report.sections` gives a section its form.
Reads the embed folder and ingest's shards; writes PNG files.
"""

from collections.abc import Mapping
from pathlib import Path

import flows.images.latent_grids as latent_grids
from flows.images.latent_grids import Grid
from flows.images.png import write_sheet
from indexing.evaluation.evaluate import EvaluateConfig
from indexing.metrics.bootstrap import Z_95, Figure, mean_figure
from indexing.report import sections
from infra.storage.shard_reader import ShardReader
from training.diffusion.likelihood import BitsPerDim
from training.generation import latents, reconstruction
from training.generation.reconstruction import Described, InversionRow, Likelihood
from training.generation.unclip import Unclip

COLUMNS = 9
SAMPLES = 3
TITLE = "The decoder's diffusion"
SPLIT = "held_out_concept"


def section(
    config: EvaluateConfig, model: Unclip, embed: Path, shards: ShardReader, out: Path
) -> sections.ReportSection:
    """Return the report's section on the decoder; write its PNG files into `out`/pictures."""
    side_px, seed = model.decoder.config.image_size_px, config.seed
    wanted = max(config.likelihood_pictures, config.inversion_pictures, config.latent_pictures)
    held_out = reconstruction.read(embed, shards, SPLIT, model.tokenizer, side_px, wanted, seed)
    text = [
        "One picture of each held-out concept, drawn by the seed; the decoder saw none of them in "
        "training."
        if len(held_out)
        else "No pair of a held-out concept: the decoder is not measured on unseen pictures."
    ]
    tables, pictures = [], []
    if len(held_out) and config.likelihood_pictures:
        count = config.likelihood_pictures // 2 or 1
        trained = reconstruction.read(embed, shards, "train", model.tokenizer, side_px, count, seed)
        if len(trained):
            judged = held_out.first(config.likelihood_pictures)
            bounds = reconstruction.likelihood(
                model.decoder, judged, trained, config.likelihood_draws, seed
            )
            tables.append(_likelihood_table(bounds))
        else:
            text.append(
                "Its likelihood is not measured: there are no training pictures to find the best "
                "variance on."
            )
    if len(held_out) and config.inversion_pictures:
        rows = reconstruction.inversion(
            model.decoder, held_out.first(config.inversion_pictures), config.inversion_steps
        )
        tables.append(_inversion_table(rows, config))
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    pictures.append(_across_time(config, model, out))
    described = held_out.first(config.latent_pictures)
    if len(described):
        shared_facts, picture = _shared(config, model, described, out)
        tables.append(shared_facts)
        pictures.append(picture)
    if len(described) > 1:
        pictures.append(_interpolation(config, model, described, out))
    return sections.section(TITLE, text, tables, pictures)


def _likelihood_table(bounds: Likelihood) -> sections.Table:
    """Return the table of the likelihood bounds, with intervals from the standard errors."""
    how = "learned variance" if bounds["variance"] == "learned" else "best variance for its errors"
    caption = (
        "Likelihood: the variational bound on -log2 p(x_0) in bits per dimension over T = "
        f"{bounds['T']} steps, "
        f"the decoder blended with x_t at every t as is best on {bounds['calibrated_on']} "
        f"training pictures, and with the {how}; "
        f"{bounds['draws'] + 1} network calls a picture, 95 % interval from the standard error. "
        "z_i is made from the picture itself, so only the second row may be held against PNG"
    )
    rows: list[list[sections.Cell]] = []
    for name, bits in (
        ("told z_i and caption", bounds["told_all"]),
        ("told nothing", bounds["told_nothing"]),
    ):
        rows.append(
            [
                name,
                _bits_figure(bits),
                bits["standard_error"],
                bits["prior"],
                bits["diffusion"],
                bits["decoder"],
                bits["samples"],
            ]
        )
    rows.append(
        [
            "PNG, best compression",
            bounds["png_bits_per_dim"],
            None,
            None,
            None,
            None,
            bounds["told_nothing"]["samples"],
        ]
    )
    return sections.table(
        caption, ["", "Bits/dim", "Standard error", "L_T", "L_1 to L_T-1", "L_0", "n"], rows
    )


def _bits_figure(bits: BitsPerDim) -> Figure:
    value, error = bits["bits_per_dim"], bits["standard_error"]
    return {
        "value": value,
        "n": bits["samples"],
        "groups": bits["samples"],
        "unit": "bits/dim",
        "low": None if error is None else value - Z_95 * error,
        "high": None if error is None else value + Z_95 * error,
    }


def _inversion_table(rows: list[InversionRow], config: EvaluateConfig) -> sections.Table:
    """Return the table of the PSNR of DDIM inversion by step count."""
    by_steps: dict[int, list[Figure]] = {}
    for row in rows:
        figure = mean_figure(
            row["psnr_db"], range(len(row["psnr_db"])), config.resamples, config.seed, unit="dB"
        )
        by_steps.setdefault(row["steps"], []).append(figure)
    caption = (
        "Reconstruction: a picture carried to noise by DDIM inversion and back by DDIM in as many "
        "steps, told z_i and caption, "
        "no guidance. Peak signal-to-noise ratio in dB, mean of "
        f"{len(rows[0]['psnr_db']) if rows else 0} pictures; "
        "a refinement costs one more network call an inverted step"
    )
    head = [
        "Steps",
        *("one refinement" if is_refined else "plain" for is_refined in reconstruction.REFINEMENTS),
    ]
    return sections.table(
        caption, head, [[str(steps), *figures] for steps, figures in by_steps.items()]
    )


def _across_time(config: EvaluateConfig, model: Unclip, out: Path) -> sections.Picture:
    """Write the picture of x_t and the predicted x_0 over time; return its entry."""
    prompts = config.prompts[: config.latent_prompts]
    steps = min(config.latent_steps, model.decoder.schedule.T)
    columns = min(COLUMNS, steps + 1)
    frames = latents.across_time(model, prompts, columns, steps, config.seed, config.guidance)
    caption = (
        f"Generation across time, DDIM in {steps} steps, seed {config.seed}: above what the "
        "sampler holds, "
        "below what the decoder takes it for. What and where is settled early, detail late."
    )
    alt = f"x_t and the predicted x_0 from t = {frames.times[0]} to 0 for {', '.join(prompts)}"
    return _sheet(
        latent_grids.across_time(frames, prompts),
        "across-time",
        alt,
        caption,
        {"steps": steps, "seed": config.seed},
        out,
    )


def _shared(
    config: EvaluateConfig, model: Unclip, described: Described, out: Path
) -> tuple[sections.Table, sections.Picture]:
    """Write the picture of samples that share an x_t; return their distances and its entry."""
    times = latents.times_at(model.decoder.schedule, config.latent_times)
    latents_shared = latents.sharing(
        model.decoder, described.x_0, times, SAMPLES, config.latent_steps, config.seed
    )
    caption = (
        "Samples that share x_t: a held-out picture is noised to t once and drawn again several "
        "times, "
        "the decoder told nothing (no z_i, no caption). The smaller t, the more they share."
    )
    table = sections.table(
        "How much samples from one x_t share: root mean square difference on the scale 0 to 255",
        ["t", "Two samples of one x_t", "A sample and its picture"],
        [
            [str(t), apart, reference]
            for t, apart, reference in zip(
                times, latents_shared.between_samples_rms, latents_shared.to_image_rms, strict=True
            )
        ],
    )
    alt = (
        f"Held-out pictures, their x_t at t = {', '.join(map(str, times))}, and samples of each: "
        f"{', '.join(described.captions)}"
    )
    facts = {
        "steps": config.latent_steps,
        "seed": config.seed,
        "keys": described.keys,
        "times": times,
    }
    return table, _sheet(
        latent_grids.shared(latents_shared, described, times),
        "shared-latents",
        alt,
        caption,
        facts,
        out,
    )


def _interpolation(
    config: EvaluateConfig, model: Unclip, described: Described, out: Path
) -> sections.Picture:
    """Write the picture of blends in x_t space; return its entry."""
    times = latents.times_at(model.decoder.schedule, config.latent_times)
    first, second = described.halves()
    blends = latents.interpolation(
        model.decoder, (first.x_0, second.x_0), times, COLUMNS, config.latent_steps, config.seed
    )
    caption = (
        "Interpolation of two held-out pictures in x_t space, the decoder told nothing: both are "
        "noised alike to t, "
        "blended, and drawn. Small t blends pixels; large t gives other pictures that both ends "
        "could come from."
    )
    pairs = "; ".join(f"{a} to {b}" for a, b in zip(first.captions, second.captions, strict=True))
    facts = {
        "steps": config.latent_steps,
        "seed": config.seed,
        "keys": [first.keys, second.keys],
        "times": times,
    }
    alt = f"Blends at t = {', '.join(map(str, times))}: {pairs}"
    return _sheet(
        latent_grids.interpolation(blends, first, second, times),
        "interpolation",
        alt,
        caption,
        facts,
        out,
    )


def _sheet(
    grid: Grid, name: str, alt: str, caption: str, facts: Mapping[str, object], out: Path
) -> sections.Picture:
    write_sheet(grid.images, grid.rows, grid.columns, out / "pictures" / f"{name}.png", facts)
    # The sheet is enlarged already; pixelated scaling would only spoil its labels.
    return sections.picture(f"pictures/{name}.png", alt, caption)
