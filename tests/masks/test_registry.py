"""Programs as rows: what a new one gives without another line of code, and what the registry refuses."""

import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.geometries import small
from tests.plan.test_plan import mask_of_intervals, mask_of_side
from tests.programs import JOINT_THEN_ACTION, NEW, registered
from wam_kernels import (
    PROGRAMS,
    RULE_PROGRAMS,
    Attends,
    InteractionProgram,
    RuleGeometry,
    TileShape,
    compile_plan,
    dense_mask,
    register_program,
    unregister_program,
)
from wam_kernels.masks.programs import TABLE
from wam_kernels.masks.rules import Runs
from wam_models import MODEL_PROGRAMS, cli
from wam_models.draw.masks import draw_programs


@pytest.mark.parametrize("row", NEW, ids=lambda row: row.name)
def test_plans_of_a_new_row_match_the_predicate(row):
    options = (
        {}, {"window": 1}, {"prefix_frames": 2}, {"singleton_frame": 3}, {"history": "full"},
        {"conditional_history": "previous_boundary_video_only", "chunk_size": 1},
    )  # fmt: skip
    with registered(row):
        for geometry in (small(row.name, **changes) for changes in options):
            mask, plan = dense_mask(geometry), compile_plan(geometry, tile=TileShape(8, 8))
            np.testing.assert_array_equal(mask_of_side(plan.queries, 1, geometry.length)[0], mask)
            np.testing.assert_array_equal(mask_of_intervals(geometry, transposed=True), mask.T)


def test_stages_hold_whatever_the_row():
    """Of every row, the stages read only what is there; and where there are none, no order of the streams has that."""

    def holds(row, order):
        made = set()
        for stage in order:
            for query, key in row.noisy_to_noisy.pairs:
                if query in stage and key not in stage:
                    return False
            for query, key in row.noisy_to_clean.pairs:
                if query in stage and key not in made:
                    return False
                # a clean copy is made when its stage ends, of what has been resolved by then
                if query in stage and any(q == key and k not in made for q, k in row.clean_to_clean.pairs):
                    return False
            made |= set(stage)
        return True

    orders = ((0, 1),), ((0,), (1,)), ((1,), (0,))
    relations = [Attends(bits) for bits in range(16)]
    found = 0
    for noisy, clean, copied in product(relations, relations, [r for r in relations if Attends.OWN in r]):
        row = InteractionProgram("any", "action", noisy, clean, copied)
        assert row.has_rollout == any(holds(row, order) for order in orders)
        if row.has_rollout:
            found += 1
            assert holds(row, row.stages)
            for wanted in ((0,), (1,)):
                needed = row.needed(wanted)
                assert holds(row, [[s for s in stage if s in needed] for stage in row.stages])
    assert found > 50


def test_pictures_and_lists_have_the_new_row(capsys):
    before = len(PROGRAMS), draw_programs(60).height
    with registered(*NEW[::-1]):
        assert list(PROGRAMS)[-1] == list(MODEL_PROGRAMS)[-2] == "joint_then_action"
        assert len(PROGRAMS) == before[0] + 4 and draw_programs(60).height > before[1]
        assert cli.main(["mask", "--program", "joint_then_action"]) == 0
        with pytest.raises(ValueError, match="must be one of .*'joint_then_action'"):
            small("jiont")
    assert len(PROGRAMS) == before[0] and "joint_then_action" not in MODEL_PROGRAMS
    assert cli.main(["mask", "--program", "joint_then_action"]) == 2
    assert "--program must be one of" in capsys.readouterr().err


def test_a_name_keeps_its_row():
    """Plans are cached by names, and geometries hold them: another row would get an old one's plan."""
    with registered(JOINT_THEN_ACTION):
        geometry = small("joint_then_action")
        plan = compile_plan(geometry)
    again = pickle.loads(pickle.dumps(geometry))
    np.testing.assert_array_equal(dense_mask(again), plan.mask()[0, 0].numpy())
    with pytest.raises(ValueError, match="program must be one of"):
        small("joint_then_action")
    with pytest.raises(ValueError, match="'joint_then_action', which stood for another row in this process"):
        register_program(replace(JOINT_THEN_ACTION, noisy_to_clean=Attends.NONE))
    with registered(replace(JOINT_THEN_ACTION)):
        assert compile_plan(small("joint_then_action")) is plan
    vars(again)["program"] = "of_another_process"
    with pytest.raises(ValueError, match="'of_another_process' is not known in this process; register_program it"):
        dense_mask(again)


def diagonal(*, frames: int, tokens) -> RuleGeometry:
    """Every frame attends to itself."""
    runs = Runs(np.full(frames, tokens), *(np.arange(frames) * scale for scale in (0, 1, 0, 0)))
    return RuleGeometry("diagonal", ("frames",), runs, runs, lambda q, k: q.frame == k.frame)


def test_a_rule_of_ones_own_is_registered_like_a_row(capsys):
    with registered(diagonal):
        rule = RULE_PROGRAMS["diagonal"]
        assert rule.__doc__ == diagonal.__doc__ and "diagonal" not in PROGRAMS
        sample = rule(frames=np.int64(3), tokens=2)
        assert sample is rule(frames=3, tokens=2)
        expected = np.kron(np.eye(3), np.ones((2, 2))).astype(bool)
        np.testing.assert_array_equal(compile_plan(sample).mask()[0, 0].numpy(), expected)
        assert pickle.loads(pickle.dumps(sample)).ranges == sample.ranges
        with pytest.raises(ValueError, match="diagonal: frames must be an int, got 2.5"):
            rule(frames=2.5, tokens=1)
        assert cli.main(["mask", "--program", "diagonal"]) == 2
        assert "program_image(wam_kernels.RULE_PROGRAMS['diagonal'](...), 860)" in capsys.readouterr().err
        with pytest.raises(ValueError, match="name must be new, got 'diagonal', which is taken"):
            register_program(InteractionProgram("diagonal", "video", *[Attends.OWN] * 3))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: register_program(TABLE[0]), ValueError, "name must be new, got 'video_then_action', which is taken"),
        (lambda: register_program(replace(TABLE[0], name="generalist_joint_denoising")), ValueError, "which is taken"),
        (lambda: register_program("joint"), TypeError, "build must be a function of sizes, got 'joint'"),
        (lambda: register_program(lambda: None), ValueError, "name must be an identifier, .*'<lambda>'"),
        (lambda: unregister_program("jiont"), ValueError, "unregister_program: name must be one of .*'jiont'"),
        (lambda: replace(TABLE[0], name="then action"), ValueError, "name must be an identifier, .*'then action'"),
        (lambda: replace(TABLE[0], first=0), ValueError, r"first must be one of \('video', 'action'\), got 0"),
        (lambda: replace(TABLE[0], noisy_to_clean=3), TypeError, "noisy_to_clean must be an Attends, got 3"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
