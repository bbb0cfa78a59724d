"""Whether IMA shares the chip, what its kernel adds, and how the duty follows from IMA's wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm import ima
from provider_proxy.host.tpm.pace import FIRST_GUESS_S, LEAST_DUTY, Pace, capped_duty

NOWHERE = Path("/nonexistent")


def folder_with(path: Path, count: str) -> Path:
    path.mkdir()
    (path / "runtime_measurements_count").write_text(count)
    return path


@pytest.mark.parametrize(
    ("count", "expected"),
    [("0\n", False), ("1\n", False), ("2\n", True), ("4711\n", True), ("", None), ("many", None)],
)
def test_more_than_the_boot_aggregate_is_a_policy(
    tmp_path: Path, count: str, expected: bool | None
) -> None:
    assert ima.is_measuring(folder_with(tmp_path / "ima", count)) is expected


def test_no_ima_is_not_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert ima.is_measuring(NOWHERE) is False
    (tmp_path / "ima").mkdir()
    assert ima.is_measuring(tmp_path / "ima") is None


def test_the_bound_holds_where_ima_measures_or_may(tmp_path: Path) -> None:
    active = folder_with(tmp_path / "active", "9")
    idle = folder_with(tmp_path / "idle", "1")
    unreadable = folder_with(tmp_path / "unreadable", "")
    assert ima.wait_bound_s(30, active) == 0.03
    assert ima.wait_bound_s(30, unreadable) == 0.03
    assert ima.wait_bound_s(30, idle) is None
    assert ima.wait_bound_s(30, NOWHERE) is None
    assert ima.wait_bound_s(0, active) is None


@pytest.mark.parametrize(
    ("release", "switch", "config", "words"),
    [
        ("6.9.12-amd64", None, None, None),
        ("5.15.0-91-generic", None, None, None),
        ("6.10.1", None, None, "From kernel 6.12 on"),
        ("6.11.0-8-generic", None, "CONFIG_TCG_TPM2_HMAC=y\n", "From kernel 6.12 on"),
        ("6.12.6-amd64", None, None, "boot with tpm.disable_pcr_integrity=1"),
        ("6.12.6-amd64", "N\n", None, "boot with tpm.disable_pcr_integrity=1"),
        ("6.12.6-amd64", "Y\n", None, None),
        ("6.12.6-amd64", "N\n", "# CONFIG_TCG_TPM2_HMAC is not set\n", None),
        ("7.0.0", "N\n", None, "boot with tpm.disable_pcr_integrity=1"),
        ("unknown", None, None, None),
    ],
)
def test_kernels_that_slow_each_extend(
    tmp_path: Path, release: str, switch: str | None, config: str | None, words: str | None
) -> None:
    if switch is not None:
        (tmp_path / "switch").write_text(switch)
    if config is not None:
        (tmp_path / f"config-{release}").write_text(config)
    said = ima.slow_extends(
        release, switch=tmp_path / "switch", boot_config=str(tmp_path / "config-{release}")
    )
    if words is None:
        assert said is None
    else:
        assert said is not None
        assert words in said
        assert release in said


# --- the duty ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote_s", "bound_s", "expected"),
    [
        (0.188, None, 0.5),
        (0.071, 0.03, 0.5),
        (0.2, 0.03, 0.3),
        (0.552, 0.03, 0.06 / 0.552),
        (1.236, 0.03, LEAST_DUTY),
    ],
)
def test_the_cap_follows_from_the_bound(
    quote_s: float, bound_s: float | None, expected: float
) -> None:
    assert capped_duty(0.5, quote_s, bound_s) == pytest.approx(expected)


def test_a_small_max_duty_is_kept() -> None:
    assert capped_duty(0.01, 1.236, 0.03) == 0.01


def test_the_rest_follows_the_learnt_time() -> None:
    """A chip is known only once it has quoted: the cap moves with what is learnt."""
    pace = Pace(0.5, ima_wait_s=0.03)
    assert pace.max_duty == pytest.approx(0.06 / FIRST_GUESS_S)
    pace.learn(0.6)
    assert pace.max_duty == pytest.approx(0.1)
    assert pace.pause_s == pytest.approx(5.4)
    assert pace.rest_after(0.6) == pytest.approx(5.4)
    assert pace.state(0.0, trouble=None).max_duty == pytest.approx(0.1)
    for _ in range(60):
        pace.learn(0.05)
    assert pace.max_duty == 0.5
    assert pace.rest_after(0.05) == pytest.approx(0.05)


# --- what the doctor says ---------------------------------------------------------------------------


def said_of(monkeypatch: pytest.MonkeyPatch, measuring: bool | None, **times: float) -> list[str]:
    monkeypatch.setattr(ima, "slow_extends", lambda: None)
    monkeypatch.setattr(ima, "is_measuring", lambda: measuring)
    return list(ima.advice(Tpm(), {"ecc": 71.0, "rsa": 600.0}, times))


def test_the_doctor_says_what_ima_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_of(monkeypatch, True, extend=6.0) == [
        "IMA's extend takes 6 ms. Beside quotes of an ecc key at a duty of 0.50 a new program waits "
        "24 ms for it on average, and 77 ms at most.",
        "IMA's extend takes 6 ms. Beside quotes of an rsa key at a duty of 0.10 a new program waits "
        "36 ms for it on average, and 606 ms at most.",
    ]
    assert "Cannot read whether IMA" in said_of(monkeypatch, None, extend=6.0)[0]


def test_the_doctor_says_nothing_of_an_ima_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert said_of(monkeypatch, False, extend=6.0) == []
    assert said_of(monkeypatch, True) == []  # an extend could not be measured


def test_the_doctor_says_what_the_kernel_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ima, "slow_extends", lambda: "slow")
    monkeypatch.setattr(ima, "is_measuring", lambda: False)
    assert list(ima.advice(Tpm(), {"ecc": 71.0}, {"extend": 6.0})) == ["slow"]
