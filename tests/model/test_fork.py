"""Forks of an episode: what is imagined there is taken back, and nothing is copied for it."""

import copy
import gc
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wam_models import GJD

from .test_rollout import assert_same, noises, real, started


def imagine(episode, seed, chunks):
    """Several chunks ahead: the last one that is proposed."""
    for i in range(chunks):
        episode.accept(episode.propose(**noises(episode.chunk_size, seed + i)))
    return episode.propose(**noises(episode.chunk_size, seed + chunks))


def assert_equal(episode, twin):
    """To the bit, now and after what is observed next."""
    assert (episode.next_frame, episode.observed) == (twin.next_frame, twin.observed)
    for b in range(2):
        for ours, theirs in zip(episode.accepted(b), twin.accepted(b), strict=True):
            assert torch.equal(ours, theirs)
    for seed in (50, 60):
        ours, theirs = (e.propose(**noises(e.chunk_size, seed)) for e in (episode, twin))
        assert torch.equal(ours.video, theirs.video) and torch.equal(ours.action, theirs.action)
        episode.observe(*real(3, seed), frames=[3, 1])
        twin.observe(*real(3, seed), frames=[3, 1])


@pytest.mark.parametrize(
    "program, options",
    [
        (GJD, {}),
        ("video_then_action", {}),
        ("joint", {"cache": "recomputed"}),
        ("joint", {"guidance": 2.0, "history": "video_only"}),
    ],
    ids=str,
)
def test_a_fork_leaves_no_trace(program, options):
    episode, twin = (started(program, lookahead=3, **options) for _ in range(2))
    for e in (episode, twin):
        e.observe(*real(5, 3))
        e.accept(e.propose(**noises(2, 0)))  # and one chunk is predicted already
    proposed = episode.propose(**noises(2, 9))
    with episode.fork() as branch:
        assert branch is episode
        ahead = imagine(episode, 20, 2)
        expected = imagine(copy.deepcopy(twin), 20, 2)
        assert_same(ahead.video, expected.video)
        assert episode.next_frame == [12, 12]
        with episode.fork():  # of the fork
            episode.propose(**noises(2, 3))
        assert_same(episode.propose(**noises(2, 22)).action, expected.action)
    with pytest.raises(RuntimeError, match="planned"), episode.fork():
        imagine(episode, 30, 1)
        raise RuntimeError("planned")
    with pytest.raises(ValueError, match="candidate must continue the episode as it is now"):
        episode.accept(ahead)
    episode.accept(proposed)  # from before the forks
    twin.accept(twin.propose(**noises(2, 9)))
    assert_equal(episode, twin)


def test_forks_of_candidates():
    """Each of many is followed further, one is chosen, and then all is as if the others had not been."""
    episode, twin = (started("joint", candidates=3, lookahead=2) for _ in range(2))
    for e in (episode, twin):
        e.observe(*real(4, 3))
    noise = [noises(2, i) for i in range(3)]
    many = episode.propose_many(**{k: [n[k] for n in noise] for k in noise[0]})
    later = []
    for candidate in many:
        with episode.fork():
            episode.accept(candidate)
            later.append(episode.propose(**noises(2, 7)))
    assert (later[0].action - later[1].action).abs().max() > 1e-6
    for e in (episode, twin):
        e.accept(e.propose_many(**{k: [n[k] for n in noise] for k in noise[0]})[1])
    assert torch.equal(episode.propose(**noises(2, 7)).action, later[1].action)
    assert_equal(episode, twin)


def test_reused_residuals_of_a_chunk_that_is_taken_back_are_forgotten():
    episode, twin = (started("joint", reuse_chunk=0.5, reuse_flow=0.9, steps=4) for _ in range(2))
    for e in (episode, twin):
        e.accept(e.propose(**noises(2, 0)))
        e.observe(*real(2, 3))
    with episode.fork():
        imagine(episode, 40, 1)
    ours, theirs = (e.propose(**noises(2, 5)) for e in (episode, twin))
    assert torch.equal(ours.action, theirs.action) and ours.forwards == theirs.forwards


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def bytes_held():
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]  # not FakeTensor
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_nothing_is_copied():
    """To begin and to end a fork runs no operation, and what is imagined in it needs no memory beside the episode's."""
    episode = started("joint", lookahead=2)
    episode.observe(*real(4, 3))
    imagine(copy.deepcopy(episode), 20, 1)  # what is made at first use
    with Counted() as mode:
        fork = episode.fork()
        fork.__enter__()
        fork.__exit__(None, None, None)
    assert mode.calls == 0
    imagine(episode, 20, 0)
    before, address = bytes_held(), episode.cache.buffer.data_ptr()
    with episode.fork():
        episode.accept(episode.propose(**noises(2, 20)))
        inside = bytes_held()
    assert episode.cache.buffer.data_ptr() == address and episode.cache.buffer.nbytes > 10_000
    assert bytes_held() <= inside <= before + 2000  # noise and buffers of the clean chunk's ranges


def test_what_a_fork_refuses():
    episode = started(GJD)
    episode.observe(*real(4, 3))
    with episode.fork():
        for call, refused in (
            ("observe", lambda: episode.observe(*real(1, 3))),
            ("restart", lambda: episode.restart([0], real(1, 3)[0][:1], torch.zeros(1, 3, 8))),
            ("set_bridge", lambda: episode.set_bridge(torch.zeros(2, 1, 1))),
            ("set_context", lambda: episode.set_context({})),
        ):
            with pytest.raises(ValueError, match=f"{call}: the episode must not be in a fork"):
                refused()
        imagine(episode, 0, 1)
        with pytest.raises(ValueError, match="at most RolloutConfig.lookahead=1 chunks beyond the last observation"):
            imagine(episode, 2, 1)
        for copied in (copy.deepcopy(episode), pickle.loads(pickle.dumps(episode))):
            copied.observe(*real(1, 3))  # an episode of its own
    episode.observe(*real(1, 3))
