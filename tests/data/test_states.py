"""States as frames: units, the limit of a latent, and what a checkpoint holds of them."""

import numpy as np
import pytest

from wam_models.data import StateCodec
from wam_models.data.states import LIMIT


@pytest.fixture(scope="module")
def states():
    return np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32) * [2.0, 0.5, 0.001] + 1


def test_latents_are_in_units_of_the_standard_deviation(states):
    codec = StateCodec.fit(states)
    latents = codec.encode(states.astype(np.float32))
    assert latents.shape == (3, 200, 1, 1)
    np.testing.assert_allclose(latents[:2].std((1, 2, 3), correction=0), 1, rtol=1e-5)
    assert latents[2].std() < 0.1  # it hardly varies beside the others
    np.testing.assert_allclose(codec.decode(latents), states, atol=1e-5)


def test_what_training_never_showed_is_as_far_as_the_limit(states):
    codec = StateCodec.fit(states)
    far = codec.mean.numpy()[None] + codec.std.numpy() * [[37, -37, 1]]
    latents = codec.encode(far.astype(np.float32))[:, 0, 0, 0]
    np.testing.assert_allclose(latents, [LIMIT, -LIMIT, 1], rtol=1e-4)
    assert codec.encode(np.full((1, 3), np.nan, np.float32)).isnan().all()


def test_a_checkpoint_keeps_the_limit_and_an_older_one_has_none(states):
    codec = StateCodec.fit(states)
    again = StateCodec.from_state_dict(codec.state_dict(), codec.config)
    assert again.limit == LIMIT
    older = StateCodec.from_state_dict(codec.state_dict(), {})
    assert older.config == {} and older.encode(np.full((1, 3), 1e3, np.float32)).max() > LIMIT
    for wrong in ({"limit": "5"}, {"limit": -1.0}, {"other": 1}):
        with pytest.raises(ValueError, match="limit"):
            StateCodec.from_state_dict(codec.state_dict(), wrong)
