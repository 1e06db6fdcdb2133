"""Match the people on one frame with those of the frames before, by an exported model."""

import numpy as np
import onnxruntime
from scipy.optimize import linear_sum_assignment


class Tracker:
    """Gives each person a number, by the similarity of their embeddings."""

    def __init__(self, model: str, least_similarity: float) -> None:
        self.session = onnxruntime.InferenceSession(model)
        self.least = least_similarity
        self.tracks = np.empty((0, 0), np.float32)  # the last embedding of each person so far

    def __call__(self, crops: list[np.ndarray]) -> list[int]:
        """Return the number of each person on a frame; crops are (H, W, 3) uint8 RGB."""
        if not crops:
            return []
        rows = [self.session.run(None, {"images": crop[None]})[0] for crop in crops]
        found = np.concatenate(rows)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        numbers = np.full(len(found), -1)
        if len(self.tracks):
            similarity = found @ self.tracks.T
            new, old = linear_sum_assignment(similarity, maximize=True)
            near = similarity[new, old] >= self.least
            numbers[new[near]] = old[near]
            self.tracks[numbers[numbers >= 0]] = found[numbers >= 0]
        fresh = np.flatnonzero(numbers < 0)
        numbers[fresh] = len(self.tracks) + np.arange(len(fresh))
        self.tracks = np.concatenate([self.tracks.reshape(-1, found.shape[1]), found[fresh]])
        return numbers.tolist()
