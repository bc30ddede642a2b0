"""The paper's recipe has the paper's sizes, and the capacity plan's counts agree with arithmetic
done by hand.
"""

import json
import re

import pytest
import torch

from flows.cli.main import main
from flows.config.run_config import load_recipe
from flows.orchestration.capacity_plan import capacity, described, published, size
from training.jobs import cost_model as costs
from training.jobs.cost_model import Cost, need
from training.models.decoder import Decoder
from training.models.transformer import heads_of
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.prior_section import PriorConfig
from training.sections.upsampler_section import UpsamplerConfig

PAPER_M = {"prior": 1000, "decoder": 3500, "upsampler": 700, "upsampler_2": 300}


def test_the_papers_recipe_has_the_papers_sizes() -> None:
    plan = capacity(load_recipe("paper"), 300, 650_000_000)
    counts = {name: plan[name]["parameters"] / 1e6 for name in PAPER_M}
    for name, paper in PAPER_M.items():
        assert counts[name] == pytest.approx(paper, rel=0.35 if name == "prior" else 0.16), counts
    assert plan["decoder"]["parameters"] == pytest.approx(3.5e9, rel=0.03)
    assert (
        {"prior": 1e9, "decoder": 3.5e9, "upsampler": 7e8, "upsampler_2": 3e8}
        == published("paper")
        == published("paper_autoregressive")
    )
    assert published("quickstart") == {}
    assert {name for name in counts | {"clip": 0} if plan[name]["sharded"]} == {"clip", "decoder"}
    assert all(plan[name]["memory_bytes_per_worker"] < 80e9 for name in counts | {"clip": 0}), (
        "one worker's GPU of 80 GB"
    )
    assert plan["embed"]["storage_bytes"] == 650_000_000 * 2 * 1024 * 2
    assert plan["decoder"]["days"] == pytest.approx(
        load_recipe("paper").decoder.images
        * plan["decoder"]["flops_per_image"]
        / (256 * 300e12)
        / 86_400,
        rel=1e-3,
    )


def test_the_papers_other_prior_is_table_3s() -> None:
    config = load_recipe("paper_autoregressive")
    prior = config.prior
    cost = costs.prior_cost(
        prior, config.clip.embed_dim, config.tokenizer.vocab_size, config.tokenizer.context
    )
    assert cost.parameters == pytest.approx(1e9, rel=0.15)
    assert (prior.kind, prior.width, prior.depth, heads_of(prior.width)) == (
        "autoregressive",
        1664,
        24,
        26,
    )
    assert (prior.pca_dims, prior.buckets, prior.batch_size, prior.images // prior.batch_size) == (
        319,
        1024,
        4096,
        1_000_000,
    )
    assert (
        prior.learning_rate,
        prior.weight_decay,
        prior.beta_2,
        prior.adam_eps,
        prior.ema_decay,
    ) == (1.6e-4, 4e-2, 0.91, 1e-10, 0.999)
    assert need(cost, prior, config.cluster.prior_workers, None)["memory_bytes_per_worker"] < 80e9
    assert config.decoder == load_recipe("paper").decoder


def test_with_a_pretrained_clip_only_what_is_known_is_counted() -> None:
    config = load_recipe("upsampling")
    config = config.model_copy(
        update={"clip": config.clip.model_copy(update={"pretrained": "somewhere"})}
    )
    assert set(capacity(config, None, 1000)) == {"upsampler", "ingest"}


def test_a_prior_costs_six_flops_a_weight_and_token() -> None:
    config = PriorConfig(width=128, depth=4)
    cost = costs.prior_cost(config, 64, 300, 28)
    weights, tokens = 4 * 12 * 128**2, 28 + 4
    attention = 4 * 2 * 2 * tokens**2 * 128  # forward; both products, multiply and add
    assert cost.flops == pytest.approx(6 * weights * tokens + 3 * attention, rel=0.05)


def test_activations_grow_with_the_picture_and_exclude_attention_weights() -> None:
    base = {"width": 32, "multiples": (1, 2), "text_width": 32, "text_depth": 1, "patch_px": 1}
    sides = (16, 32)
    small, large = (
        costs.decoder_cost(
            DecoderConfig(image_size_px=side, attention_px=(side,), **base), 16, 300, 8
        ).activation_bytes
        for side in sides
    )
    assert (
        3.5 < large / small < 4.5
    )  # with the attention's 1024 x 1024 weights it would be far more
    config = DecoderConfig(image_size_px=32, attention_px=(), **base)
    kept: dict[int, int] = {}
    model = Decoder(config, 16, 300, 8)
    own = {p.data_ptr() for p in model.parameters()}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        z, ids = torch.zeros(1, 16), torch.ones(1, 8, dtype=torch.long)
        output = model(
            torch.zeros(1, 3, 32, 32), torch.ones(1, dtype=torch.long), model.condition(z, ids)
        )
    assert output.requires_grad
    counted = costs.decoder_cost(config, 16, 300, 8).activation_bytes
    assert counted == pytest.approx(2 * sum(kept.values()), rel=0.15)


def test_every_kind_of_model_is_counted() -> None:
    assert costs.clip_cost(ClipConfig(), 300, 16).flops > 0
    assert costs.prior_cost(PriorConfig(kind="autoregressive", pca_dims=8), 16, 300, 16).flops > 0
    assert costs.decoder_cost(DecoderConfig(learned_variance=True), 16, 300, 16).flops > 0
    whole, quarter = (
        costs.upsampler_cost(UpsamplerConfig(crop_fraction=fraction)).flops
        for fraction in (0.5, 0.25)
    )
    assert whole / quarter == pytest.approx(4, rel=0.05)


def test_sharding_divides_the_state_and_throughput_gives_days() -> None:
    cost = Cost(10**9, 1e12, 10**6, undivided=10**6, held=5 * 10**6, largest=10**7)
    config = PriorConfig(images=864_000, batch_size=64)
    whole, sharded, alone = (
        need(cost, config.model_copy(update={"shard": shard}), workers, 1e12)
        for shard, workers in ((False, 8), (True, 8), (True, 1))
    )
    assert whole["state_bytes_per_worker"] == alone["state_bytes_per_worker"] == 20 * 10**9
    assert (
        sharded["state_bytes_per_worker"]
        == 20 * 999 * 10**6 // 8 + 20 * 10**6 + 8 * 5 * 10**6 + 10 * 10**7
    )
    assert sharded["memory_bytes_per_worker"] == sharded["state_bytes_per_worker"] + 8 * 10**6
    assert (whole["sharded"], sharded["sharded"], alone["sharded"]) == (False, True, False)
    assert (
        whole["days"] == pytest.approx(864_000 / 8 / 86_400)
        and whole["images_per_s"] == 8
        and whole["batch_per_worker"] == 8
    )
    assert "days" not in need(cost, config, 8, None)
    assert "20.0 GB and" in described(whole) and "2.7 GB, sharded, and" in described(sharded)
    assert "1,000.0 GFLOP an image" in described(
        whole
    ) and "images each: 20.0 GB together" in described(whole)
    assert [size(x) for x in (1500, 2.5e6, 3e9, 4e12)] == ["1.5 kB", "2.5 MB", "3.0 GB", "4.0 TB"]


def test_a_dry_run_tells_memory_and_arithmetic_unasked_and_the_papers_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr(
        "flows.orchestration.capacity_plan.PAPERS", ("quickstart",)
    )  # the paper's own takes a minute to count
    with pytest.raises(SystemExit) as left:
        main(["run", "quickstart", "--dry-run"])
    out = capsys.readouterr().out
    assert not left.value.code and "GFLOP an image; state" in out and "days" not in out
    assert re.search(
        r"^decoder .* M parameters \(the paper's: 3,500 M\)$", out, re.M
    ) and not re.search("^clip .*paper", out, re.M)
    with pytest.raises(SystemExit):
        main(["train", "prior", "quickstart", "--dry-run", "--json"])
    stages = {each["stage"]: each for each in json.loads(capsys.readouterr().out)["stages"]}
    assert "decoder" not in stages and stages["prior"]["paper_parameters"] == 10**9
    assert (
        stages["prior"]["need"]["memory_bytes_per_worker"] > 0
        and "days" not in stages["prior"]["need"]
    )


def test_the_dry_run_prints_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(["run", "quickstart", "--dry-run", "--throughput", "0.1", "--pairs", "8000", "--json"])
    assert not left.value.code
    stages = {each["stage"]: each for each in json.loads(capsys.readouterr().out)["stages"]}
    assert (
        stages["decoder"]["need"]["days"] > 0
        and stages["decoder"]["need"]["parameters"] == stages["decoder"]["parameters"]
    )
    assert (
        stages["ingest"]["need"] == {"storage_bytes": int(8000 * 64**2 * 0.4)}
        and "need" not in stages["curate"]
    )
    for arguments, message in (
        (["--throughput", "1"], "give --dry-run as well"),
        (["--pairs", "5"], "--pairs is for planning: give --dry-run as well"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["run", "quickstart", *arguments])
        assert left.value.code == 2 and message in capsys.readouterr().err
