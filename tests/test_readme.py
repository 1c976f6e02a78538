"""The README's code runs, its links lead somewhere, and its tags exist."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_eoss import SharpnessMonitor
from lightning_eoss.demo import DigitsMLP, digits
from lightning_eoss.display import tags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_block_is_python():
    """So that no block escapes the test below."""
    assert [language for language, _ in BLOCKS] == ["python"] * 5


@pytest.mark.filterwarnings("default")  # Lightning's advice on workers and loggers, as a user would see it
@pytest.mark.parametrize(
    "code", [code for _, code in BLOCKS], ids=["quickstart", "without_a_trainer", "predictions", "rates", "noise"]
)
def test_block_runs(code, tmp_path, monkeypatch, capsys):
    """Runs each block in an empty directory, and checks the numbers that its comments promise."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"SharpnessMonitor": SharpnessMonitor}
    exec(code.replace("max_steps=4000", "max_steps=20"), scope)
    if "result" in scope:
        full, mini = capsys.readouterr().out.strip().splitlines()[-2:]
        assert float(full) == pytest.approx(4.5, rel=1e-3)
        mean, lower, upper = map(float, mini.split())
        assert lower <= 5 <= upper
        assert mean == pytest.approx(5, rel=0.3)
    elif "callbacks" in scope:
        Trainer(callbacks=list(scope["callbacks"]), max_steps=2).fit(DigitsMLP(), DataLoader(digits(100), 10))
        assert all(
            callback.history
            for callback in scope["callbacks"]
            if type(callback).__module__.startswith("lightning_eoss")
        )
    else:
        assert any(tmp_path.rglob("events.out.tfevents.*"))


def test_links_lead_to_files():
    """Tests and documents that the README names are there."""
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tags_exist():
    """Every tag in the README is one that is logged."""
    named = set(re.findall(r"`((?:sharpness|cost|prediction|learning_rate|gradient_noise|weights)/\w+)`", README)) - {
        "sharpness/preconditioner_"
    }
    assert named <= {*tags.DESCRIPTIONS, tags.LAMBDA_MAX}
