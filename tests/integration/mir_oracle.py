"""Float64 reference of MIR in numpy, written from Eq. 1-4 of the paper and the published accurate mode."""

import numpy as np
import scipy.linalg


def norms(features):
    """l2 norms rounded to float32, on which the outlier rule is defined."""
    return np.linalg.norm(features, axis=1).astype(np.float32).astype(np.float64)


def outliers(features):
    """|norm - median| > 3 std (ddof 1), with the lower median for an even count."""
    size = norms(features)
    median = np.sort(size)[(len(size) - 1) // 2]
    return np.abs(size - median) > 3 * size.std(ddof=1)


def process(features, rule):
    """The features after the outlier rule "remove", "median" or "none"."""
    out = outliers(features)
    if rule == "remove":
        return features[~out]
    if rule == "median" and out.any():
        features = features.copy()
        features[out] = np.sort(features, axis=0)[(len(features) - 1) // 2]
    return features


def trace_root(a, b, how):
    """Tr((ab)^(1/2)): "sqrtm" of the product itself, or "eigh" of a^(1/2) b a^(1/2), which may be singular."""
    if how == "sqrtm":
        return np.trace(scipy.linalg.sqrtm(a @ b)).real
    values, vectors = np.linalg.eigh(a)
    # A variance that is only rounding counts as 0: its square root would be 1e8 times larger.
    values[values < 1e-13 * values.max()] = 0.0
    root = (vectors * np.sqrt(values)) @ vectors.T
    values = np.linalg.eigvalsh(root @ b @ root)
    values[values < 1e-13 * values.max()] = 0.0
    return np.sqrt(values).sum()


def distance(vision, text, *, rule="remove", normalize=True, how="sqrtm"):
    """One layer's Frechet distance of features (n, d) and (m, d)."""
    vision, text = (np.asarray(x, dtype=np.float64) for x in (vision, text))
    alpha = len(text) / np.linalg.norm(text, axis=1).sum() if normalize else 1.0
    vision, text = process(vision, rule) * alpha, process(text, rule) * alpha
    a, b = np.cov(vision, rowvar=False, ddof=1), np.cov(text, rowvar=False, ddof=1)
    mean = ((vision.mean(axis=0) - text.mean(axis=0)) ** 2).sum()
    return mean + np.trace(a) + np.trace(b) - 2 * trace_root(a, b, how)


def mir(vision, text, **options):
    """log10 of the sum over layers."""
    return np.log10(sum(distance(v, t, **options) for v, t in zip(vision, text, strict=True)))
