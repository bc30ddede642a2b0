"""Images per second of our ingest and of plain img2dataset on the same clean URLs, cores and sizes;
robots.txt and all limits on.

The server runs on the same machine, in a process of its own. Runs alternate, the best of each
counts; exits with 1 below 0.95 of
img2dataset's rate or where either loses a picture.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.sources.url_table import DataConfig
from tests.helpers.local_ingest import local_ingest

COUNT, SIDE_PX, ROUNDS = 3000, 64, 2
SERVE = """
import sys
from pathlib import Path
from flows.sources.static_server import StaticServer
with StaticServer({"m": Path(sys.argv[1])}) as server:
    print(server.base, flush=True)
    sys.stdin.read()
"""
PLAIN = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], input_format="parquet", url_col="url", caption_col="caption", output_format="webdataset",
             output_folder=sys.argv[2], processes_count=2, thread_count=16, image_size=int(sys.argv[3]), resize_mode="border",
             encode_format="png", encode_quality=1, number_sample_per_shard=1000, extract_exif=False, retries=2,
             disallowed_header_directives=[])
"""  # noqa: E501


def draw(folder: Path, count: int) -> None:
    """Write pictures that no other number has."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(count):
        blocks = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        cv2.imwrite(
            str(folder / f"{number}.png"),
            cv2.resize(blocks, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC),
        )


def plain(urls: Path, out: Path) -> int:
    """Run img2dataset as its README does; return how many pictures it has."""
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(urls), str(out), str(SIDE_PX)],
        check=True,
        capture_output=True,
    )
    return sum(int(json.loads(file.read_text())["successes"]) for file in out.glob("*_stats.json"))


def ours(urls: Path, out: Path) -> int:
    """Run our ingest with a Ray of its own, its start included; return how many pictures it has."""
    config = DataConfig.model_validate(
        {
            "sources": [{"kind": "urls", "path": str(urls)}],
            "allow_private": True,
            "image_size_px": SIDE_PX,
        }
    )
    return int(local_ingest(config, out)["out"])


def main() -> int:
    """Measure both in turn and print the rates."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    best = {"img2dataset": 0.0, "ours": 0.0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "pictures", count)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder / "pictures")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdin and server.stdout
        base = server.stdout.readline().strip()
        rows = [
            {"url": f"{base}/m/{number}.png", "caption": f"thing {number}"}
            for number in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "urls.parquet")
        for turn in range(ROUNDS):
            for label, run in (("img2dataset", plain), ("ours", ours)):
                clock = time.monotonic()
                found = run(folder / "urls.parquet", folder / f"{label}-{turn}")
                rate = count / (time.monotonic() - clock)
                print(
                    f"{label:<12} {found:,} of {count:,} pictures, {rate:,.0f} images/s", flush=True
                )
                if found != count:
                    return 1
                best[label] = max(best[label], rate)
        server.stdin.close()
        server.wait()
    ratio = best["ours"] / best["img2dataset"]
    print(f"ours / img2dataset = {ratio:.2f}")
    return 0 if ratio >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
