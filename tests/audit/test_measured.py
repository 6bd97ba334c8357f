"""Which faults, with which conditions, follow from measured steps; the steps are made up."""

from __future__ import annotations

from typing import Any

import pytest

from truestep.audit.postmortem.measured import Measured, Measurement, faults


def step(version: str, *kinds: str, unsplit: Any = None, **more: Any) -> Measurement:
    """A step of deepspeed: faulty if kinds are given. Keys that a measurement does not have are the configuration."""
    given = {key: more.pop(key) for key in list(more) if key in Measurement.__dataclass_fields__}
    return Measurement(**{
        "subject": "DeepSpeed", "versions": {"deepspeed": version}, "configuration": more, "kinds": kinds,
        "verdict": "FAULT" if kinds else "RIGHT", "unsplit": unsplit, **given,
    })  # fmt: skip


def needs(measured: Measured) -> dict[str, tuple[set[Any], set[Any]]]:
    return {need.key: (set(need.faulty), set(need.right)) for need in measured.needs}


def test_a_key_whose_change_changes_the_verdict_is_a_condition() -> None:
    (found,) = faults(
        [
            step("1.0", "kept_last", stage=2, offload=True, processes=1),
            step("1.0", "kept_last", stage=2, offload=True, processes=2),
            step("1.0", stage=2, offload=False, processes=1),
            step("1.0", stage=1, offload=True, processes=1),
            step("1.1", stage=2, offload=True, processes=1),
        ]
    )
    assert needs(found) == {"stage": ({2}, {1}), "offload": ({True}, {False})}
    assert (found.faulty, found.right) == (("1.0",), ("1.1",))


def test_two_changes_at_once_show_nothing() -> None:
    (found,) = faults([step("1.0", "kept_last", stage=2, offload=True), step("1.0", stage=1, offload=False)])
    assert needs(found) == {}


def test_the_conditions_of_several_releases_are_put_together() -> None:
    (found,) = faults(
        [
            step("1.0", "kept_last", stage=2), step("1.0", stage=1),
            step("1.1", "kept_last", stage=2), step("1.1", stage=3),
        ]
    )  # fmt: skip
    assert needs(found) == {"stage": ({2}, {1, 3})}
    assert found.faulty == ("1.0", "1.1")


def test_a_release_that_was_audited_with_one_value_only_is_known_only_for_it() -> None:
    steps = [step("1.0", "micro_mean", arch="llama"), step("1.0", "micro_mean", arch="gpt2")]
    other = step("1.1", "micro_mean", "accumulation_missing", arch="gpt2")
    both, one = faults([*steps, other])
    assert (needs(both), needs(one)) == ({}, {"arch": ({"gpt2"}, set())})
    for release in ("0.9", "1.1"):
        (together,) = faults([step(release, "micro_mean", arch="gpt2"), *steps])
        assert needs(together) == {}


def test_a_value_that_is_not_the_default_is_a_condition_and_the_default_is_none() -> None:
    (by_hand,) = faults([step("1.0", "kept_last", manual=True), step("1.1", manual=True)])
    assert needs(by_hand) == {"manual": ({True}, set())}
    (plain,) = faults([step("1.0", "kept_last"), step("1.0", manual=True)])
    assert needs(plain) == {"manual": ({False}, {True})}
    first, second = faults([step("1.0", "kept_first_and_last"), step("1.0", "kept_last", manual=True)])
    assert {bool(needs(first)), bool(needs(second))} == {True, False}


def test_a_remedy_is_a_measured_step() -> None:
    (found,) = faults(
        [
            step("1.0", "kept_last", offload=True, remedy="x", changes={"offload": False}),
            step("1.1", "kept_last", offload=True, remedy="y", release="1.5"),
        ]
    )
    assert needs(found) == {"offload": ({True}, {False})}
    assert (found.faulty, found.right) == (("1.0", "1.1"), ("1.5",))


def test_a_fault_of_a_dependency_is_not_the_frameworks() -> None:
    trl = {"subject": "TRL SFTTrainer", "versions": {"trl": "3.0", "deepspeed": "1.0"}}
    alone, own = step("1.0", "kept_last"), step("", "kept_last", "micro_mean", **trl)
    one, other = faults([alone, own])
    assert (one.package, one.kinds, one.through) == ("deepspeed", ("kept_last",), (own,))
    assert (other.package, other.kinds, other.faulty) == ("trl", ("micro_mean",), ("3.0",))
    newer = step("", "kept_last", **{**trl, "versions": {"trl": "3.0", "deepspeed": "1.1"}})
    assert [f.package for f in faults([alone, newer])] == [
        "deepspeed",
        "trl",
    ]  # 1.1 was not audited without trl


def test_a_bisection_adds_releases_of_the_configuration_that_it_ran() -> None:
    ran = {"by_bisection": True, "stage": 2}
    (found,) = faults(
        [
            step("1.0", "kept_last", stage=2), step("1.0", stage=1),
            step("1.2", "kept_last", **ran), step("1.3", **ran), step("1.4", "kept_last", **{**ran, "stage": 1}),
        ]
    )  # fmt: skip
    assert (found.faulty, found.right) == (("1.0", "1.2"), ("1.3",))


@pytest.mark.parametrize("verdict", ["NOT RUN", "NOT OBSERVABLE"])
def test_what_was_not_seen_shows_nothing(verdict: str) -> None:
    (found,) = faults(
        [step("1.0", "kept_last"), step("1.1", verdict=verdict), step("1.2", verdict="DEFAULT")]
    )
    assert (found.faulty, found.right) == (("1.0",), ("1.2",))


def test_the_rounding_of_the_audited_step_is_no_condition() -> None:
    (found,) = faults([step("1.0", "kept_last", stage=2, autocast="bfloat16"), step("1.1", stage=2)])
    assert (needs(found), found.right) == ({}, ("1.1",))


def test_an_option_that_only_some_configurations_set_is_a_condition() -> None:
    (found,) = faults(
        [step("1.0", "micro_mean", loss_type="bnpo"), step("1.0"), step("1.0", loss_type="grpo")]
    )
    assert needs(found) == {"loss_type": ({"bnpo"}, {"default", "grpo"})}


def test_a_configuration_may_lack_a_key() -> None:
    (found,) = faults([step("1.0", "kept_last", stage=2, offload=True), step("1.0", stage=2)])
    assert needs(found) == {"offload": ({True}, {"default"})}
    (found,) = faults([step("1.0", "kept_last", stage=2), step("1.0", stage=1, offload=False)])
    assert needs(found) == {}


def test_only_faults_at_the_end_of_an_epoch_have_its_condition() -> None:
    (found,) = faults([step("1.0", "step_sizes", "rows_lost")])
    assert found.hidden == "window_not_shown"
    (found,) = faults([step("1.0", "micro_mean", "rows_lost")])
    assert found.hidden == ""


def test_adamw_decides_nothing() -> None:
    assert faults([step("1.0", "micro_mean", optimizer="adamw")]) == ()


@pytest.mark.parametrize(
    ("kind", "unsplit", "least"),
    [
        ("kept_first_and_last", (), 3),
        ("kept_last", (), 2),
        ("micro_mean", ("rank_mean",), 2),  # another fault
        ("rank_mean", ("rank_mean",), 1),
        ("kept_last", None, 1),  # not run
    ],
)
def test_how_many_micro_batches_a_fault_needs(kind: str, unsplit: Any, least: int) -> None:
    (found,) = faults([step("1.0", kind, unsplit=unsplit, processes=2)])
    assert found.least == least
    assert ("processes" in needs(found)) == (kind == "rank_mean")


def test_a_loop_that_sets_the_boundary_ignores_the_configured_number() -> None:
    (found,) = faults([step("1.0", "kept_last", unsplit=(), manual=True)])
    assert found.least == 1


def test_releases_are_ordered_by_number() -> None:
    (found,) = faults(
        [step(v, "kept_last") for v in ("0.10.0", "0.9.1", "0.9.10")] + [step("0.8"), step("0.11")]
    )
    assert (found.faulty, found.right) == (("0.9.1", "0.9.10", "0.10.0"), ("0.8", "0.11"))
