"""Square: random search with square patches, no gradient (Andriushchenko et al., ECCV 2020, arXiv 1912.00049).

Maximises the margin of the best wrong class; each query repaints one square of the perturbation and is kept where the loss
rises. It catches models that hide their gradient: a model that Square breaks and APGD does not is one of them.

Cost: 1 unit a query (no backward pass), for samples that have survived so far. With few samples left (``rows``) a call holds
several queries of each, all from where the sample stands: those after the first that is kept are asked again, which adds up to
a tenth. Squares that are kept are the same. What differs from the authors' code: every sample has squares of its own, drawn
from its seed (theirs draws one place for the whole batch); squares may touch the last row and column (``edges``); in training
it maximises the objective's loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from zsr.attacks.ascent import Look
from zsr.attacks.base import AttackResult, BoundedAttack, BoundedConfig, Logits, PerSampleLoss
from zsr.attacks.losses import margin
from zsr.attacks.noise import derived_seeds, fill_uniform
from zsr.attacks.patches import repainted_l2, repainted_linf, stripes, tiles
from zsr.attacks.threat import ThreatModel

_BLOCK = 250  # queries whose random numbers are drawn at once
_CLEAR = 50  # queries between two looks from the host at which samples are done
_KEPT = 0.2  # squares kept in a call of several queries, expected at most: then about a tenth of them is asked again
_MEMORY = 0.9  # of how many are kept, from call to call
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the share of pixels halves


class SquareConfig(BoundedConfig):
    stops_early: ClassVar[bool] = True
    name: Literal["square"] = "square"
    queries: Annotated[int, Field(ge=0)] = 5000
    restarts: Annotated[int, Field(ge=1)] = 1
    first_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the image's pixels in the first squares; it halves after 10, 50, 200, ... queries."""
    rescale: bool = False
    """Stretch that schedule, made for 10000 queries, to the number of queries; AutoAttack does not."""
    edges: bool = True
    """Squares may touch the last row and column, as the paper has it. The authors' code leaves these two out, which matters for
    images of a few pixels."""


class Square(BoundedAttack[SquareConfig]):
    """Repaint squares at random; keep what raises the loss."""

    def perturb(
        self, loss: PerSampleLoss, image_BCHW: Tensor, seeds: Sequence[int], progress: float = 1.0
    ) -> AttackResult:
        threat = self.threat(progress)
        found_BCHW = image_BCHW
        if threat.eps:
            found_BCHW, _ = self._restarts(lambda x, _: (loss(x), None), threat, image_BCHW, seeds)
        return AttackResult(found_BCHW, torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device))

    @torch.no_grad()
    def attack_classifier(
        self, logits: Logits, image_BCHW: Tensor, label_B: Tensor, seeds: Sequence[int]
    ) -> AttackResult:
        threat = self.threat()
        zero_grad_B = torch.zeros(len(image_BCHW), dtype=torch.bool, device=image_BCHW.device)
        wrong_B = logits(image_BCHW).argmax(1) != label_B
        right = (~wrong_B).nonzero().flatten()
        if threat.eps == 0 or not len(right):
            return AttackResult(image_BCHW, zero_grad_B, wrong_B)

        def look(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            logits_BC, own_B = logits(x), label_B[right[rows]]
            return margin(logits_BC, own_B), logits_BC.argmax(1) != own_B

        image_BCHW = image_BCHW.clone()
        image_BCHW[right], wrong_B[right] = self._restarts(
            look, threat, image_BCHW[right], [seeds[row] for row in right.tolist()]
        )
        return AttackResult(image_BCHW, zero_grad_B, wrong_B)

    @torch.no_grad()
    def _restarts(
        self, look: Look, threat: ThreatModel, image_BCHW: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Image of highest loss, or the first success, and whether it is one."""
        search = _Search(look, threat, image_BCHW, self.config.edges, self.rows)
        for restart in range(self.config.restarts):
            search.start(derived_seeds(seeds, "square", restart))
            for first, end in self._stretches():
                search.drop_done()
                if not len(search.row_B):
                    break
                search.ask(first, end, self._side(first, image_BCHW))
            search.finish()
        return search.found_BCHW, search.success_B

    def _side(self, query: int, image_BCHW: Tensor) -> int:
        """Side of the squares at this query, in pixels."""
        height, width = image_BCHW.shape[2:]
        share = self.config.first_share / 2 ** sum(self._moment(query) > change for change in _HALVINGS)
        return min(max(round((share * height * width) ** 0.5), 1), height, width)

    def _moment(self, query: int) -> int:
        """Of the schedule."""
        return query * 10000 // self.config.queries if self.config.rescale else query

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """Queries from one look from the host to the next, each stretch of squares of one size."""
        queries = self.config.queries
        begins = [
            query
            for query in range(queries)
            if query % _CLEAR == 0
            or query & (query - 1) == 0
            or any(self._moment(query - 1) <= change < self._moment(query) for change in _HALVINGS)
        ]
        return pairwise([*begins, queries])


class _Search:
    """The random search of one batch. ``row_B`` are the samples still searched; other fields have a row for each of them,
    except ``found_BCHW`` and its companions, which have a row for each sample given."""

    def __init__(self, look: Look, threat: ThreatModel, image_BCHW: Tensor, edges: bool, rows: int) -> None:
        num, device = len(image_BCHW), image_BCHW.device
        self.look, self.threat, self.all_BCHW, self.edges, self.rows = look, threat, image_BCHW, edges, rows
        self.repaint = repainted_linf if threat.norm == "linf" else repainted_l2
        self.found_BCHW = image_BCHW.clone()
        self.found_loss_B = torch.full((num,), -torch.inf, dtype=image_BCHW.dtype, device=device)
        self.success_B = torch.zeros(num, dtype=torch.bool, device=device)

    def start(self, seeds: Sequence[int]) -> None:
        """Stripes (L-inf) or tiles (L2) on every sample that is not lost yet."""
        self.seeds, self.asked, self.kept = seeds, 1.0, 1.0  # recent queries, and squares kept
        self.row_B = (~self.success_B).nonzero().flatten()
        self.image_BCHW = self.all_BCHW[self.row_B]
        make = stripes if self.threat.norm == "linf" else tiles
        delta_BCHW = make(self.image_BCHW, self._seeds("start")) * self.threat.eps
        self.best_BCHW = self._attacked(delta_BCHW, self.image_BCHW)
        self.best_loss_B, success_B = self.look(self.best_BCHW, self.row_B)
        self.done_B = torch.zeros_like(self.row_B, dtype=torch.bool) if success_B is None else success_B
        self.random_BQK = self.image_BCHW.new_empty(len(self.row_B), 0)  # drawn block by block

    def ask(self, first: int, end: int, side: int) -> None:
        """Queries ``first`` to ``end - 1`` of every sample, with squares of one size."""
        if first % _BLOCK == 0:
            numbers = torch.empty(len(self.row_B), _BLOCK, 5 + self.image_BCHW.shape[1], device=self.row_B.device)
            self.random_BQK = fill_uniform(numbers, self._seeds(first))
        self.query_B = torch.full_like(self.row_B, first)
        if self.rows < 2 * len(self.row_B):  # a full batch: all are at the same query, and the host need not look
            for _ in range(first, end):
                self._call(torch.arange(len(self.row_B), device=self.row_B.device), 1, end, side)
            return
        while len(open_rows := ((self.query_B < end) & ~self.done_B).nonzero().flatten()):
            most = min(self.rows // len(open_rows), end - int(self.query_B[open_rows].amin()))
            ahead = min(max(int(_KEPT * self.asked / max(self.kept, 0.01)), 1), most)
            asked, kept = self._call(open_rows, ahead, end, side)
            self.asked, self.kept = _MEMORY * self.asked + int(asked), _MEMORY * self.kept + int(kept)

    def _call(self, at: Tensor, ahead: int, end: int, side: int) -> tuple[Tensor, Tensor]:
        """The next ``ahead`` queries of the samples ``at``, all from where each stands, up to the first that is kept.

        Shapes: N samples, A queries of each; rows of a batch of both are sample by sample.

        Returns:
            How many queries counted and how many squares were kept, of all samples together.
        """
        query_NA = self.query_B[at, None] + torch.arange(ahead, device=at.device)
        rows = at.repeat_interleave(ahead)
        random_BK = self.random_BQK[rows, query_NA.flatten() % _BLOCK]
        image_BCHW = self.image_BCHW[rows]
        delta_BCHW = self.repaint(self.best_BCHW[rows] - image_BCHW, self.threat.eps, side, random_BK, self.edges)
        attacked_BCHW = self._attacked(delta_BCHW, image_BCHW)
        loss_B, success_B = self.look(attacked_BCHW, self.row_B[rows])
        kept_NA = loss_B.view(-1, ahead) > self.best_loss_B[at, None]
        if success_B is not None:
            kept_NA |= success_B.view(-1, ahead)
        kept_NA &= (query_NA < end) & ~self.done_B[at, None]
        number_A = torch.arange(ahead, device=at.device)
        first_N = torch.where(kept_NA, number_A, ahead).amin(1)
        any_N = first_N < ahead
        taken = torch.arange(len(at), device=at.device) * ahead + first_N.clamp(max=ahead - 1)
        self.best_BCHW[at] = torch.where(any_N.view(-1, 1, 1, 1), attacked_BCHW[taken], self.best_BCHW[at])
        self.best_loss_B[at] = torch.where(any_N, loss_B[taken], self.best_loss_B[at])
        if success_B is not None:
            self.done_B[at] |= any_N & success_B[taken]
        counted_N = torch.where(any_N, first_N + 1, ahead).minimum(end - self.query_B[at])
        self.query_B[at] += counted_N
        return counted_N.sum(), any_N.sum()

    def drop_done(self) -> None:
        self.finish()
        keep = (~self.done_B).nonzero().flatten()
        for name in ("row_B", "image_BCHW", "best_BCHW", "best_loss_B", "done_B", "random_BQK"):
            setattr(self, name, getattr(self, name)[keep])

    def finish(self) -> None:
        """Write down what was found for the samples in the search."""
        take_B = self.done_B | (self.best_loss_B > self.found_loss_B[self.row_B])
        self.found_BCHW[self.row_B[take_B]] = self.best_BCHW[take_B]
        self.found_loss_B[self.row_B[take_B]] = self.best_loss_B[take_B]
        self.success_B[self.row_B] |= self.done_B

    def _attacked(self, delta_BCHW: Tensor, image_BCHW: Tensor) -> Tensor:
        return (image_BCHW + self.threat.project(delta_BCHW, image_BCHW)).clamp(0, 1)

    def _seeds(self, purpose: object) -> list[int]:
        return derived_seeds([self.seeds[row] for row in self.row_B.tolist()], purpose)
