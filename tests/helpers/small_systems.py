"""Small text-to-image systems in the folders that a run leaves: untrained ones whose every layer
matters, in a ROOT where asked.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from flows.runs.records import write_run
from infra.schemas import EMBEDDED
from infra.storage import commits, manifests, store
from infra.storage.manifest_schema import StageFacts
from infra.storage.manifests import Committed
from infra.storage.store import Root
from training.jobs.train import write_model
from training.models.clip import CLIP
from training.models.decoder import Decoder
from training.models.diffusion_prior import Prior
from training.models.tokenizer import Tokenizer
from training.sections.clip_section import ClipConfig
from training.sections.decoder_section import DecoderConfig
from training.sections.prior_section import PriorConfig
from training.sections.tokenizer_section import TokenizerConfig

E = 16
PROMPTS = ["a red heart", "blue", "two green apples on a white table"]
CLIP_CONFIG = ClipConfig(
    image_size_px=16, width=16, depth=1, text_width=32, text_depth=1, embed_dim=E
)
PRIOR_CONFIG = PriorConfig(width=32, depth=1, T=50, sampling_steps=4)
DECODER_CONFIG = DecoderConfig(
    image_size_px=8,
    width=16,
    multiples=(1,),
    attention_px=(4,),
    text_width=32,
    text_depth=1,
    T=50,
    sampling_steps=4,
    parametrisation="v",
    time_power=1,
)


def write_system(folder: Path) -> Path:
    """Write the folders `clip`, `prior` and `decoder` of untrained models and return where they
    are.
    """
    tokenizer = Tokenizer.fit(PROMPTS, TokenizerConfig(vocab_size=280, context=32))
    torch.manual_seed(0)
    sizes = (tokenizer.vocab_size, tokenizer.context)
    models = {
        "clip": CLIP(CLIP_CONFIG, *sizes),
        "prior": Prior(PRIOR_CONFIG, E, *sizes),
        "decoder": Decoder(DECODER_CONFIG, E, *sizes),
    }
    for (name, model), config in zip(
        models.items(), (CLIP_CONFIG, PRIOR_CONFIG, DECODER_CONFIG), strict=True
    ):
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1 and not p.any():
                    p.normal_(std=0.1)
        (folder / name).mkdir(parents=True)
        tokenizer.save(folder / name / "tokenizer.json")
        write_model(name, model, model.state_dict(), config, folder / name)
    return folder


def write_embeddings(folder: Path, count: int = 40) -> Path:
    """Write an `embed` folder of random unit vectors, all in the training split."""
    rng = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for name in ("img_emb", "text_emb"):
        vectors = rng.normal(size=(count, E)) * np.linspace(3, 0.1, E)
        np.save(
            folder / name / f"{name}_0000.npy",
            (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16),
        )
    rows = [
        {
            "key": f"{n:04}",
            "caption": "x",
            "captions": ["x"],
            "split": "train",
            "licence": "MIT",
            "style": "s",
        }
        for n in range(count)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, EMBEDDED), folder / "metadata" / "metadata_0000.parquet"
    )
    return folder


def write_root(folder: Path) -> Root:
    """Return a ROOT with the record of a run `small` of these models and embeddings."""
    root = store.open_root(str(folder / "root"))
    made = write_system(folder / "made")
    write_embeddings(made / "embed")
    committed: dict[str, Committed] = {}
    for stage in ("clip", "embed", "prior", "decoder"):
        facts: StageFacts = {
            "stage_version": 1,
            "sections": {},
            "inputs": {},
            "input_digests": {},
            "config": {},
            "counts": {"in": 40, "out": 40, "dropped": {}},
            "started": manifests.now(),
        }
        committed[stage] = commits.commit(root, stage, f"{stage}-key", made / stage, facts)
    write_run(root, "small", "small.toml", manifests.now(), committed)
    return root
