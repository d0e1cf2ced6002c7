"""Independence of subproblems: how little their sentence embeddings point the same way."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Encoder = Callable[[list[str]], "np.ndarray"]  # n texts → (n, d) vectors

NEUTRAL_INDEPENDENCE = 0.5  # for a plan that has no pair of subproblems to compare


class SentenceEncoder:
    """all-MiniLM (or another sentence-transformers model), loaded on first use, on the CPU.

    On the CPU because it is tiny next to a language model whose memory it must not take.
    """

    def __init__(self, model: str) -> None:
        self._name = model
        self._model: Any = None

    def load(self) -> None:
        """Load the model now, so that a missing one is noticed before a long run.

        Raises:
            UserError: when it can be found neither on disk nor on the Hub.
        """
        if self._model is None:
            from common.models import load_sentence_encoder

            self._model = load_sentence_encoder(self._name)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors of shape (n, d) for n texts."""
        self.load()
        # Small batches of texts of similar length: 31 subproblems and questions take 0.35 s, in one batch 1.02 s, most
        # of it padding (docs/performance.md).
        return self._model.encode(texts, batch_size=8, show_progress_bar=False, convert_to_numpy=True)


class Embeddings:
    """Unit vectors of texts, each distinct text encoded once, the most recent ones remembered."""

    def __init__(self, encoder: Encoder, cache_size: int = 20000) -> None:
        self._encoder = encoder
        self._cache_size = cache_size
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Seconds spent encoding since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def vectors(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """A unit vector (d,) for each distinct text; the zero vector stays zero."""
        import numpy as np

        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if text not in self._cache]
        fresh: dict[str, np.ndarray] = {}
        if missing:
            started = time.perf_counter()
            encoded = np.asarray(self._encoder(missing), dtype=np.float64)  # (n, d)
            norms = np.linalg.norm(encoded, axis=1, keepdims=True)
            self._seconds += time.perf_counter() - started
            fresh = dict(zip(missing, encoded / np.where(norms > 0, norms, 1.0), strict=True))
        found = {text: fresh[text] if text in fresh else self._cache[text] for text in distinct}
        self._cache.update(found)
        for text in distinct:
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return found


def independence_score(subproblems: Sequence[str], vectors: dict[str, np.ndarray]) -> float:
    """1 − mean pairwise cosine, clamped to [0, 1]; neutral for fewer than two subproblems.

    The mean over the k(k−1)/2 pairs of unit vectors v follows from their sum:
    (|Σ v|² − Σ |v|²) / (k(k−1)).
    """
    import numpy as np

    count = len(subproblems)
    if count < 2:
        return NEUTRAL_INDEPENDENCE
    stacked = np.stack([vectors[text] for text in subproblems])  # (k, d)
    total = stacked.sum(axis=0)
    mean_cosine = (total @ total - (stacked * stacked).sum()) / (count * (count - 1))
    return float(np.clip(1 - mean_cosine, 0.0, 1.0))


def relevance(subproblems: Sequence[str], question: str, vectors: dict[str, np.ndarray]) -> float:
    """Mean cosine of the subproblems with the question; 0 without subproblems."""
    if not subproblems:
        return 0.0
    return float(sum(vectors[text] @ vectors[question] for text in subproblems) / len(subproblems))
