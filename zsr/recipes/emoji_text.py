"""First stage of the emoji recipe: teach the small text tower what words mean, from text alone.

A text tower that sees only a thousand class names learns them as arbitrary codes, and an unseen name is then noise. So it is
distilled from a sentence encoder (zsr/recipes/sentence_encoder.py) before any image is looked at: names, keywords and groups of
all concepts go in, the encoder's vectors, reduced to the embedding width, are the targets. No image takes part, so the names of
held-out concepts may: a CLIP that is tested zero-shot also knows the words it is tested with.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = Any  # open_clip's tokenizer: list of texts -> LongTensor [N, context]


def reduce_width(vectors: Tensor, names: Tensor, width: int, flatten: float = 0.5) -> Tensor:
    """Principal components of centred vectors, fitted on the class names; unit length.

    `flatten` divides each component by that power of its standard deviation: sentence encoders crowd short phrases into a
    cone, and classes that differ in a weak component would otherwise ask for a very large logit scale.
    """
    mean = names.mean(0)
    _, deviations, components = torch.linalg.svd(names - mean, full_matrices=False)
    scale = deviations[:width].clamp_min(1e-6) ** -flatten
    return F.normalize((vectors - mean) @ components[:width].T * scale, dim=-1)


def enriched(names: Tensor, keywords: list[Tensor], subgroups: Tensor) -> Tensor:
    """What a name stands for: itself, the mean of its keywords and, less, its subgroup; unit length.

    A name alone places "trumpet" by the company the word keeps in sentences; with "music, brass" and "musical instrument" it
    lies where an image tower that has seen a saxophone will look for it.
    """
    means = torch.stack([rows.mean(0) if len(rows) else torch.zeros_like(names[0]) for rows in keywords])
    return F.normalize(names + F.normalize(means, dim=-1) + 0.6 * subgroups, dim=-1)


def texts_of(concepts: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Class names, and every other phrase that describes some concept."""
    names = [row["name"] for row in concepts]
    phrases = {keyword for row in concepts for keyword in row["keywords"] if any(c.isalpha() for c in keyword)}
    phrases |= {f"{row['name']}, {', '.join(row['keywords'][1:3])}" for row in concepts if len(row["keywords"]) > 2}
    phrases |= {row["group"] for row in concepts} | {row["subgroup"].replace("-", " ") for row in concepts}
    return names, sorted(phrases - set(names))


class SmallTable(nn.Embedding):
    """Stands in for the tower's table of 49,408 rows while it is trained, with the rows that occur alone.

    The optimiser then moves three thousand rows instead of all, which is most of a step's cost otherwise.
    """

    token_ids: Tensor

    def __init__(self, table: nn.Embedding, token_ids: Tensor) -> None:
        super().__init__(len(token_ids), table.embedding_dim)
        self.register_buffer("token_ids", token_ids, persistent=False)
        with torch.no_grad():
            self.weight.copy_(table.weight[token_ids])

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.searchsorted(self.token_ids, tokens))

    def expand(self, rows: int) -> nn.Embedding:
        """The full table: known rows as trained, every other one their mean."""
        with torch.no_grad():
            weight = self.weight.mean(0).repeat(rows, 1)
            weight[self.token_ids] = self.weight
        return nn.Embedding.from_pretrained(weight, freeze=False)


def distil_text(
    model: Any, tokenizer: Tokens, templates: list[str], names: list[str], phrases: list[str], targets: Tensor,
    seconds: float, seed: int, batch: int = 192, lr: float = 2e-3,
) -> Tensor:  # fmt: skip
    """Train the text tower of `model` to give `targets` (of names, then phrases); returns the token ids it has learnt.

    Half of each batch are class names in a template or bare, half are other phrases, so that neither drowns the other.
    """
    prompts = ["{}", *templates]
    name_tokens = torch.stack([tokenizer([prompt.format(name) for name in names]) for prompt in prompts], 1)
    phrase_tokens = torch.stack([tokenizer([prompt.format(phrase) for phrase in phrases]) for prompt in prompts[:2]], 1)
    token_ids = torch.unique(torch.cat([name_tokens.flatten(), phrase_tokens.flatten()]))
    full_rows = model.token_embedding.num_embeddings
    model.token_embedding = SmallTable(model.token_embedding, token_ids)
    parameters = [p for key, p in model.named_parameters() if not key.startswith(("visual.", "logit_scale"))]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)
    start, step, losses = time.monotonic(), 0, []
    while (share := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - share)
        chosen_names = [rng.randrange(len(names)) for _ in range(batch // 2)]
        chosen_phrases = [rng.randrange(len(phrases)) for _ in range(batch // 2)]
        tokens = torch.cat([
            torch.stack([name_tokens[i, rng.randrange(len(prompts))] for i in chosen_names]),
            torch.stack([phrase_tokens[i, rng.randrange(2)] for i in chosen_phrases]),
        ])  # fmt: skip
        target = targets[chosen_names + [len(names) + i for i in chosen_phrases]]
        output = model.encode_text(tokens, normalize=True)
        # Match each vector, and match the way the batch's vectors lie to one another.
        loss = (1 - (output * target).sum(-1)).mean() + (output @ output.T - target @ target.T).square().mean() * 10
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(
                f"stage=text step={step} loss={mean:.4f} elapsed={time.monotonic() - start:.0f}s of {seconds:.0f}s",
                flush=True,
            )
    print(f"stage=text done step={step} loss={losses[-1]:.4f}", flush=True)
    model.token_embedding = model.token_embedding.expand(full_rows)
    return token_ids
