"""Which version becomes the champion."""

from __future__ import annotations

import pytest

from reid_train.registry.registry import should_promote


def validated(score: str, *, test: str = "0.5", digest: str = "v") -> dict[str, str]:
    """Tags of a version that a validation split chose."""
    digests = {"evaluation_digest": "a", "validation_digest": digest}
    return {"validation/mAP": score, "mAP": test, **digests}


@pytest.mark.parametrize(
    ("candidate", "champion", "promoted"),
    [
        ({"mAP": "0.5", "evaluation_digest": "a"}, None, True),
        ({"evaluation_digest": "a"}, None, False),
        ({"mAP": "nan", "evaluation_digest": "a"}, None, False),
        ({"mAP": "0.5", "evaluation_digest": "a"}, {"mAP": "0.5", "evaluation_digest": "a"}, False),
        ({"mAP": "0.6", "evaluation_digest": "a"}, {"mAP": "0.5", "evaluation_digest": "a"}, True),
        ({"mAP": "0.6", "evaluation_digest": "a"}, {"mAP": "0.5", "evaluation_digest": "b"}, False),
        ({"mAP": "0.6", "evaluation_digest": "a"}, {"mAP": "0.5"}, False),
        (validated("0.6", test="0.1"), validated("0.5", test="0.2"), True),
        (validated("0.5", test="0.3"), validated("0.6", test="0.2"), False),
        (validated("0.6"), validated("0.5", digest="w"), False),
        (validated("0.6"), {"mAP": "0.5", "evaluation_digest": "a"}, False),
        ({"mAP": "0.6", "evaluation_digest": "a"}, validated("0.5"), False),
        (validated("nan"), None, False),
    ],
)
def test_promotion_needs_a_higher_map_on_the_same_evaluation(candidate, champion, promoted):
    assert should_promote(candidate, champion)[0] is promoted
