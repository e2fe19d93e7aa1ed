"""How alike two layers are: debiased linear CKA, cosine of tokens, size of a residual update; and two sets of images.

A pretrained model may be the eye: `token_cosine` of one of its layers for an image and its reconstruction, and
`frechet_distance` of its class tokens for images and reconstructions as two sets.

Rows are tokens of different images, the same tokens at both layers. They come in minibatches (M, R, C): M disjoint
sets of images, R rows of each, C channels. Minibatches are the units that intervals are taken over, so that tokens of
one image are never drawn apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Representation, Tokens

MINIBATCH_IMAGES = 10
LEAST_ROWS = 4  # of a minibatch: the debiased HSIC divides by R (R - 3)


def cka_products(features: Sequence[Tensor]) -> np.ndarray:
    """(M, T, T): the debiased HSIC between every two of T layers in each minibatch, but for a constant factor.

    features: T tensors (M, R, C_t), or (R, C_t). CKA of them is 1 for features equal up to rotation, shift and one
    scale, and 0 on average for independent ones. Source: HSIC_1 of Song et al., JMLR 13, 2012; summed over minibatches
    as Nguyen et al., ICLR 2021. The debiased HSIC is an inner product of U-centred Gram matrices
    (Székely & Rizzo, Annals of Statistics 42, 2014), so that |CKA| <= 1 in every minibatch and in their sum.
    """
    parts = _minibatches(features)
    rows = parts[0].shape[1]
    if rows < LEAST_ROWS:
        raise BacksightError(f"Debiased CKA needs at least {LEAST_ROWS} rows in a minibatch, not {rows}: take more.")
    centred = torch.stack([_u_centred(_varying(each)) for each in parts], dim=1)
    return torch.einsum("mtx,mux->mtu", centred, centred).numpy()


def cka_from_products(products: np.ndarray) -> np.ndarray:
    """(T, T) CKA from the products of some minibatches (M, T, T)."""
    total = products.sum(0)
    own = np.sqrt(np.clip(np.diagonal(total), 0, None))
    scale = np.outer(own, own)
    return np.divide(total, scale, out=np.zeros_like(total), where=scale > 0)


def token_cosine(first: Representation, second: Representation) -> Tensor:
    """(B,) mean over tokens (without padding, with prefix tokens) of the cosine between the tokens of two layers.

    Raises BacksightError on other numbers of tokens or channels.
    """
    if first.values.shape != second.values.shape:
        raise BacksightError(
            "The cosine of tokens needs layers with equally many tokens and channels, not "
            f"{tuple(first.values.shape)} and {tuple(second.values.shape)}."
        )
    return _over_tokens(F.cosine_similarity(first.values, second.values, dim=-1), first)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance of the Gaussians of two sets of features (N, C), (M, C); in units of the features².

    |m₁ − m₂|² + Tr(S₁ + S₂ − 2 (S₁ S₂)^½). Of the class tokens of DINOv2 it is FD-DINOv2. Small sets look farther apart
    than they are, so that only numbers of equally many images compare. Raises BacksightError where a set has no spread
    (one image), or the features are of different widths.
    Source: Dowson & Landau 1982; Heusel et al. 2017 (FID); Stein et al. 2023 (FD-DINOv2, of ViT-L/14).
    """
    if first.ndim != 2 or first.shape[1:] != second.shape[1:] or min(len(first), len(second)) < 2:
        raise BacksightError(
            "A Fréchet distance needs two sets of at least 2 features of one width, (N, C) and (M, C), not "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    means = [rows.double().mean(0) for rows in (first, second)]
    pairs = zip((first, second), means, strict=True)
    # S = RᵀR, and Tr (S₁ S₂)^½ is the sum of the singular values of R₁ R₂ᵀ, also where S has no full rank.
    roots = [torch.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r").R for rows, mean in pairs]
    overlap = torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    spread = sum(root.square().sum() for root in roots)
    return float((means[0] - means[1]).square().sum() + spread - 2 * overlap)


def residual_update(before: Representation, after: Representation) -> Tensor:
    """(B,) relative residual update ‖after - before‖ / ‖before‖, mean over tokens (without padding).

    NaN where no token of the image has a norm, as before the first layer of a DETR decoder, which starts from zeros.
    Where the model normalises after its steps (DETR), the update includes that norm.
    """
    if before.values.shape != after.values.shape:
        raise BacksightError(
            "A residual update needs the same tokens and channels before and after, not "
            f"{tuple(before.values.shape)} and {tuple(after.values.shape)}."
        )
    size = before.values.norm(dim=-1)
    ratio = (after.values - before.values).norm(dim=-1) / size
    return _over_tokens(torch.where(size > 0, ratio, torch.nan), before)


class TokenSample:
    """Rows for CKA: some tokens of each image, the same ones at every layer with as many tokens.

    tokens: drawn of each image (all where there are fewer), at the same places in every image, other than padding as
    long as there are enough. Prefix tokens (class, registers) are left out: they are another population than the
    tokens of the grid. images: at most this many are kept; count: of those that are.
    """

    def __init__(self, tokens: int = 24, images: int = 400, seed: int = 0) -> None:
        self.tokens, self.images = tokens, images
        self._generator = torch.Generator().manual_seed(seed)
        self._order: dict[int, Tensor] = {}  # of the places, for each number of tokens
        self._rows: dict[str, list[Tensor]] = {}
        self.count = 0

    def add(self, recorded: Mapping[str, Representation]) -> None:
        """Draw from a batch of images."""
        room = min(self.images - self.count, next(iter(recorded.values())).batch)
        if room <= 0:
            return
        for tap, representation in recorded.items():
            values = representation.values
            padding = None
            if isinstance(representation, Tokens):
                values, padding = representation.patches, representation.padding
            count = values.shape[1]
            if count not in self._order:
                self._order[count] = torch.rand(count, generator=self._generator)
            order = self._order[count].expand(room, count)
            if padding is not None:
                order = order + padding[:room].cpu().float()
            places = order.topk(min(self.tokens, count), dim=1, largest=False).indices
            chosen = places[..., None].to(values.device).expand(-1, -1, values.shape[2])
            self._rows.setdefault(tap, []).append(values[:room].gather(1, chosen).cpu())
        self.count += room

    def images_in_minibatch(self, images: int = MINIBATCH_IMAGES) -> int:
        """At most `images`, fewer where there are too few for four minibatches (an interval needs several)."""
        return max(1, min(images, self.count // 4))

    def minibatches(self, images: int = MINIBATCH_IMAGES) -> dict[str, Tensor]:
        """{tap: (M, R, C)}: minibatches of `images_in_minibatch` images; those left over are dropped."""
        if not self.count:
            raise BacksightError("The sample of tokens is empty: add() recordings first.")
        size = self.images_in_minibatch(images)
        whole = self.count // size * size
        return {
            tap: torch.cat(parts)[:whole].unflatten(0, (-1, size)).flatten(1, 2) for tap, parts in self._rows.items()
        }


def shuffled_rows(features: Tensor, images: int) -> Tensor:
    """Minibatches (M, R, C) in which every image has the tokens of another one: the null of a similarity.

    images: in a minibatch. Places stay, so that what two layers share because of places alone remains. A single image
    in each minibatch takes the rows of the next minibatch.
    """
    if images < 2:
        return features.roll(1, dims=0)
    return features.unflatten(1, (images, -1)).roll(1, dims=1).flatten(1, 2)


def _minibatches(features: Sequence[Tensor]) -> list[Tensor]:
    parts = [(each[None] if each.ndim == 2 else each).detach().cpu().double() for each in features]
    if any(each.ndim != 3 or each.shape[:2] != parts[0].shape[:2] or not each.numel() for each in parts):
        shapes = ", ".join(str(tuple(each.shape)) for each in features)
        raise BacksightError(f"A similarity needs the same rows (M, R, C) or (R, C) of every layer, not {shapes}.")
    if not all(bool(torch.isfinite(each).all()) for each in parts):
        raise BacksightError("The features hold NaN or infinity: check the target's weights and the images.")
    return parts


def _varying(features: Tensor) -> Tensor:
    """The features less their mean over the rows of each minibatch; spread below float32 rounding is none."""
    mean = features.mean(1, keepdim=True)
    centred = features - mean
    unresolved = centred.abs().amax(1, keepdim=True) <= 4 * torch.finfo(torch.float32).eps * mean.abs()
    return centred.masked_fill(unresolved, 0.0)


def _u_centred(features: Tensor) -> Tensor:
    """(M, R, C) -> (M, R * R): the U-centred linear Gram matrices, scaled by 1 / sqrt(R (R - 3))."""
    gram = features @ features.transpose(1, 2)
    rows = gram.shape[1]
    gram.diagonal(dim1=1, dim2=2).zero_()
    sums = gram.sum(2)
    total = sums.sum(1)[:, None, None] / ((rows - 1) * (rows - 2))
    gram = gram - sums[:, :, None] / (rows - 2) - sums[:, None, :] / (rows - 2) + total
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram.flatten(1) / (rows * (rows - 3)) ** 0.5


def _over_tokens(values: Tensor, representation: Representation) -> Tensor:
    """(B,) mean over the tokens (B, P + N) that are no padding and have a value."""
    padding = getattr(representation, "padding", None)
    if padding is not None:
        prefix = padding.new_zeros(len(padding), values.shape[1] - padding.shape[1])
        values = values.masked_fill(torch.cat([prefix, padding], dim=1), torch.nan)
    return values.nanmean(1)
