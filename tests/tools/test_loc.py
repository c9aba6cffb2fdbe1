import pytest

from tools import loc


@pytest.fixture
def root(tmp_path):
    for package in loc.BUDGET:
        (tmp_path / package).mkdir()
    return tmp_path


def write(path, lines):
    path.write_text("x = 1\n" * lines)


def test_within_budget_passes_and_prints_totals_and_medians(root, capsys):
    for name, lines in (("a.py", 10), ("b.py", 30), ("c.py", 400), ("__init__.py", 0)):
        write(root / "xlinfer" / name, lines)
    assert loc.main(root) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("xlinfer"))
    assert row.split() == ["xlinfer", "4", "440", str(loc.BUDGET["xlinfer"]), "30", "400"]


@pytest.mark.parametrize("package", loc.BUDGET)
def test_a_long_file_fails_in_every_package_and_is_named(root, capsys, package):
    (root / package / "deep").mkdir()
    write(root / package / "deep" / "long.py", loc.MAX_FILE + 1)
    assert loc.main(root) == 1
    assert f"{package}/deep/long.py: {loc.MAX_FILE + 1} lines" in capsys.readouterr().out


@pytest.mark.parametrize("package", [name for name, budget in loc.BUDGET.items() if budget])
def test_a_large_package_fails_even_when_each_file_is_short(root, capsys, package):
    for i in range((loc.BUDGET[package] or 0) // loc.MAX_FILE + 1):
        write(root / package / f"m{i}.py", loc.MAX_FILE)
    assert loc.main(root) == 1
    assert f"{package}: " in capsys.readouterr().out


def test_tests_may_be_many(root):
    for i in range(60):
        write(root / "tests" / f"test_{i}.py", loc.MAX_FILE)
    assert loc.main(root) == 0
