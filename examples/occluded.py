"""Meta-World where not everything is shown: late, or the objects and the target in one frame of four alone.

    cd examples
    wam record --simulator occluded:late_reach --simulator occluded:blinking_drawer-open --out occluded_data
    wam train metaworld_train.json --data occluded_data --out occluded_run
    wam eval --checkpoint occluded_run/checkpoint --simulator occluded:late_reach --episodes 20

The expert of ``wam record`` is told everything, so a policy learns to act as if it were. docs/ablation.md says what
that does to the interaction programs.
"""

from functools import partial

from wam_models.simulator import Observation, load

LATE = 8  # actions, a tenth of a second
BLINK = 16  # actions from one frame with the objects to the next
ROBOT = 4  # numbers of the state that are the robot's own: where its hand is, how far the gripper is open


class Hidden:
    def __init__(self, task, late=0, blink=1):
        self.inner = load(f"metaworld/{task}-v3")
        self.late, self.blink, self.states = late, blink, []
        for name in ("instruction", "horizon", "control_freq", "action_names", "state_names"):
            setattr(self, name, getattr(self.inner, name))
        self.initial_state, self.expert = self.inner.initial_state, self.inner.expert

    def reset(self, initial_state):
        self.inner.reset(initial_state)
        self.states = [self.inner.state()]

    def act(self, action):
        outcome = self.inner.act(action)
        self.states.append(self.inner.state())
        return outcome

    def observe(self):
        shown = max(0, len(self.states) - 1 - self.late)
        state = self.states[shown].copy()
        if shown % self.blink:
            state[ROBOT:] = 0
        return Observation(state)


def __getattr__(name):
    """``late_TASK`` and ``blinking_TASK``, as ``--simulator occluded:late_reach`` asks for them."""
    kind, _, task = name.partition("_")
    kinds = {"late": {"late": LATE}, "blinking": {"blink": BLINK}}
    if kind not in kinds or not task:
        raise AttributeError(f"occluded has late_TASK and blinking_TASK, not {name}")
    return partial(Hidden, task, **kinds[kind])
