"""The study: which cells, what is run of them, and what comes out."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, copied, seen_in_browser
from hypothesis import given, settings
from hypothesis import strategies as st

from inoculation import study, study_page, sweep
from inoculation.effects import verdicts
from inoculation.files import InputError
from inoculation.groups import GROUPS
from inoculation.intervals import CellRates

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
WHOLE = study.selection(PARAMS, None, None, "0,1,2", None)


def test_the_whole_study_is_six_mixtures_all_groups_and_sixteen_figures():
    chosen = study.selection(PARAMS, None, None, "0,1,2", "llama3_1_8b,gemma3_4b")
    own = [cell for cell in study.cells(PARAMS, chosen) if cell.profile == "pocket"]
    assert len(own) == len(set(own)) == 6 * len(GROUPS) * 3
    figures = study.figures(chosen, PARAMS)
    assert [figure.number for figure in figures] == list(range(1, 17))
    assert {figure.question.profile for figure in figures[14:]} == {"llama3_1_8b", "gemma3_4b"}
    assert [figure.prompts for figure in figures[12:14]] == [("default",), ("control",)]


def test_a_panel_of_prompts_gives_each_mixture_one_figure_more_with_a_number_of_its_own():
    panel = {**PARAMS, "evaluate": {**PARAMS["evaluate"], "system_prompts": ["default", "control", "own", "negated"]}}
    for transfer in (None, "pocket_llama,pocket_gemma"):
        drawn = study.figures(study.selection(panel, "all_caps+sycophancy", None, "0", transfer), panel)
        [leakage] = [figure for figure in drawn if len(figure.prompts) == 4]
        assert (
            leakage.number == 23
            and leakage.question.negative == "sycophancy"
            and {"filter_persona", "adapter_persona", "steer_persona"} < {*leakage.groups}
        )


def test_unknown_names_are_listed_all_at_once():
    with pytest.raises(InputError) as caught:
        study.selection(PARAMS, "all_caps+envy", "inoc_sae,inoc_x", "0,one", "gpt")
    for name in ("all_caps+envy", "inoc_x", "one", "gpt"):
        assert repr(name) in str(caught.value)
    with pytest.raises(InputError) as caught:
        study.selection(PARAMS, None, "base, base", f"0,0,{2**32},²", None)
    for told in ("--groups: base stands twice", "--seeds: 0 stands twice", f"'{2**32}' is no seed", "'²' is no seed"):
        assert told in str(caught.value)
    assert study.selection(PARAMS, None, "base, baseline", "0, 1", None).groups == ["base", "baseline"]
    with pytest.raises(InputError) as caught:
        study.selection(PARAMS, None, "inoc_selective", "0,00", "pocket,pocket_llama")
    for told in ("--seeds: 0 stands twice", "--transfer: 'pocket' is unknown", "--transfer: trains base, "):
        assert told in str(caught.value)


def test_a_data_set_of_ones_own_and_one_without_b_have_a_study_too():
    own = {**PARAMS, "mixture": {**PARAMS["mixture"], "positive": "other"}}
    assert study.selection(own, None, "baseline", "0", None).mixtures == [("other", "evil")]
    with pytest.raises(InputError, match=r"--mixture: 'all_caps\+evil' is unknown; valid: other\+evil"):
        study.selection(own, "all_caps+evil", "baseline", "0", None, "--mixture")
    clean = {**PARAMS, "mixture": {**PARAMS["mixture"], "contamination": 0}}
    chosen = study.selection(clean, "all_caps+evil", None, "0", None)
    assert "inoc_sae" in chosen.groups and "inoc_selective" not in chosen.groups
    assert {cell.group for cell in study.cells(clean, chosen)} == {*chosen.groups}
    with pytest.raises(InputError, match="it would be `baseline`.*(inoc_selective).*\n.*(irrelevant_selective)"):
        study.cells(clean, study.selection(clean, "all_caps+evil", "inoc_selective,irrelevant_selective", "0", None))


def test_a_part_of_the_study_has_a_name_of_its_own():
    def part(*told: str | None) -> str:
        return study.selection(PARAMS, *told, "0", None).part

    assert WHOLE.part == "" and part("all_caps+evil", None) == "all_caps+evil"
    assert part(None, "base,baseline") == "base,baseline"
    assert len(part("all_caps+evil", ",".join(list(GROUPS)[1:]))) < 100


def test_cells_that_are_missing_are_listed_with_their_seeds_together():
    some = study.cells(PARAMS, study.selection(PARAMS, "all_caps+evil", "base,inoc_sae", "0,1,2", None))
    assert study.listed(some[1:5]) == [
        "pocket, evil + all_caps: base, seeds 1, 2",
        "pocket, evil + all_caps: inoc_sae, seeds 0, 1",
    ]
    assert study.listed(some[:1]) == ["pocket, evil + all_caps: base, seed 0"]


CELLS = study.cells(PARAMS, WHOLE)
SWEPT = [
    cell._replace(setting=one)
    for cell in CELLS[:40]
    for one in sweep.settings(PARAMS, "mixture.contamination=0.25,0.5")
]


@given(st.one_of(st.sets(st.sampled_from(every), min_size=1) for every in (CELLS, SWEPT)))
@settings(max_examples=100, deadline=None)
def test_grids_are_exactly_the_cells(wanted):
    ordered = [cell for cell in (*CELLS, *SWEPT) if cell in wanted]
    told = [
        study.Cell(grid.profile, grid.positive, negative, grid.group, seed, grid.setting)
        for grid in study.grids(ordered)
        for negative in grid.negatives
        for seed in grid.seeds
    ]
    assert len(told) == len(set(told)) and set(told) == wanted


def test_a_study_goes_on_after_a_failed_cell_and_reports(project, tmp_path):
    copy = copied(project, tmp_path)
    train = copy.folder / "src/inoculation/stages/train.py"
    whole = train.read_text()
    train.write_text(whole.replace("        if not chats:", '        if chats:\n            raise SystemExit("no luck")\n        if not chats:'))  # fmt: skip
    options = ("--mixtures", "all_caps+evil", "--groups", "base,baseline", "--seeds", "0")
    told = copy.run("inoculation", "study", *options, "--dry-run").stdout
    assert "2 cells, 0 of them done; the other 2" in told and "pocket, evil + all_caps: baseline, seed 0" in told
    told = copy.run("inoculation", "study", *options, "--jobs", "2", ok=False)
    assert told.returncode == 1 and "failed: " in told.stdout and "1 of 2 cells" in told.stdout, told.stdout
    part = copy.folder / "figures/study/pocket/all_caps+evil-base,baseline"
    first = (part / "report.html").read_text()
    assert "baseline, seed 0" in first

    # The same again, with what failed put right and one group more, whose row was there before the study.
    train.write_text(whole)
    options = ("--mixtures", "all_caps+evil", "--groups", "base,baseline,inoc_selective", "--seeds", "0")
    told = copy.run("inoculation", "study", *options, "--jobs", "2").stdout
    assert "3 cells, 2 of them done; the other 1" in told and "3 of 3 cells" in told, told
    folder = part.with_name(f"{part.name},inoc_selective")
    assert (part / "report.html").read_text() == first, "another part of the study has a folder of its own"
    assert {path.name for path in folder.iterdir()} == {
        f"figure-{number:02}.{suffix}" for number in (1, 7, 13, 14) for suffix in ("png", "svg", "pdf")
    } | {"report.html"}
    page = (folder / "report.html").read_text()
    assert "Inoc-Selective suppresses B" in page and page.count("data:image/png;base64") == 4
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page, "it opens offline"
    row = next(row for row in copy.rows("study") if row.info.run_name == f"pocket: {folder.name}")
    assert row.data.metrics["holds"] + row.data.metrics["does_not_hold"] + row.data.metrics["undecided"] == 4
    assert len(row.data.tags["mlflow.note.content"]) < 8000

    before = len(copy.records())
    assert "3 cells, 3 of them done" in copy.run("inoculation", "study", *options).stdout
    commands = [record["command"][0] for record in copy.records()[before:]]
    assert commands == ["study"], "nothing is run again"
    assert len(copy.rows("study")) == 2
    told = copy.run(
        "inoculation", "study", "--mixtures", "source_citing+evil", "--seeds", "0", "--report-only", ok=False
    )
    assert "no row of these cells" in told.stderr and len(copy.rows("study")) == 2


def test_a_sweep_draws_the_rows_that_there_are_and_names_the_cells_that_are_missing(project, tmp_path):
    copy = copied(project, tmp_path)
    told = copy.run("inoculation", "sweep", "mixture.contamination=0.25,0.5", "--groups", "inoc_selective", "--dry-run")
    assert "2 cells, 1 of them done" in told.stdout
    assert "  pocket, evil + all_caps: inoc_selective, seed 0, mixture.contamination=0.25" in told.stdout
    command = ("inoculation", "sweep", "mixture.contamination=0.25,0.5", "--groups", "inoc_selective", "--report-only")
    told = copy.run(*command, ok=False)
    assert told.returncode == 1 and "1 of 2 cells" in told.stdout, told.stderr
    assert "| 0.5 | Inoc-Selective | " in told.stdout and "| 0.25 |" not in told.stdout
    folder = copy.folder / "figures/sweeps/pocket"
    assert {path.suffix for path in folder.iterdir()} == {".png", ".svg", ".pdf", ".md"}
    copy.run(*command, ok=False)
    [row] = copy.rows("study")
    assert row.info.run_name == "pocket, evil + all_caps: over mixture.contamination"
    [grid] = study.grids([SWEPT[0]])
    assert "mixture.contamination=0.25" in grid.arguments()


def test_what_cannot_be_swept_is_listed_at_once():
    with pytest.raises(InputError, match="stands twice") as caught:
        sweep.settings(PARAMS, "group=base,base")
    assert "--groups" in str(caught.value)
    for twice in ("mixture.contamination=0.1,0.10", "train.pocket.learning_rate=1e-3,0.001"):
        with pytest.raises(InputError, match="0.1? ?.*stands twice"):
            sweep.settings(PARAMS, twice)
    with pytest.raises(InputError, match=r"'\[1' is no value of YAML"):
        sweep.settings(PARAMS, "mixture.contamination=[1")
    with pytest.raises(InputError, match="mixture.sauce is missing"):
        sweep.settings(PARAMS, "mixture.sauce=1")
    with pytest.raises(InputError, match="is a table"):
        sweep.settings(PARAMS, "mixture=1")
    one = study.selection(PARAMS, "all_caps+evil", "baseline,inoc_selective", "0", None)
    with pytest.raises(InputError) as caught:
        sweep.cells(PARAMS, one, sweep.settings(PARAMS, "mixture.contamination=0,0.5,2"))
    for told, why in (
        ("save_steps=1,2", "no other experiment of baseline, inoc_selective"),
        ("pocket.chats.seed=0,1", "starts from"),
    ):
        with pytest.raises(InputError, match=why):
            sweep.cells(PARAMS, one, sweep.settings(PARAMS, told))
    for told in ("train.pocket.lora_r=4,8", "profiles.pocket.max_new_tokens=32,64", "evaluate.threshold=40,60"):
        assert len(sweep.cells(PARAMS, one, sweep.settings(PARAMS, told))) == 4
    told = str(caught.value)
    assert (
        "contamination=2: " in told
        and told.count("(baseline, inoc_selective)") == 1
        and "at mixture.contamination 0" in told
    )


def test_a_task_that_no_worker_has_is_queued_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [cell] = study.cells(PARAMS, study.selection(PARAMS, "all_caps+evil", "baseline", "1", None))
    Path("params.yaml").write_text(yaml.safe_dump(cell.params(PARAMS)))
    for command in ("init -q", "add params.yaml", "-c user.name=n -c user.email=e commit -qm queued"):
        subprocess.run(["git", *command.split()], check=True)
    task = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    asked: list[tuple[str, ...]] = []

    def dvc(*arguments: str) -> str:
        if arguments == ("queue", "status"):
            queued = sum(one[:2] == ("exp", "run") for one in asked)
            killed = ("queue", "kill", task) in asked
            lines = [f"{task} a 01:16 {'Failed' if killed else 'Running'}"] * (queued > 0) + [
                "abcdef0 b 01:16 Success"
            ] * (queued > 1)
            return "\n".join(lines)
        asked.append(arguments)
        return ""

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda said, **more: real(["true"] if "dvc" in said else said, **more))
    monkeypatch.setattr(study, "_dvc", dvc)
    monkeypatch.setattr(study.plan, "missing", lambda raw: [])
    monkeypatch.setattr(study, "LOOK", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert study.run(PARAMS, [cell], 2) == []
    again = ("exp", "run", "--queue", *study.grids([cell])[0].arguments())
    assert asked == [again, START, ("queue", "kill", task), again, START]


START = ("queue", "start", "--jobs", "2")


def test_a_stage_that_cells_share_costs_its_time_once():
    rows = [
        SimpleNamespace(data=SimpleNamespace(tags={"seconds": json.dumps({"pocket-model qwen2": 770.02, **own})}))
        for own in ({"train": 53.12, "log": 6.22}, {"train": 48.35, "log": 6.01}, {})
    ]
    rows.append(SimpleNamespace(data=SimpleNamespace(tags={})))
    assert study.spent(rows) == pytest.approx(770.02 + 53.12 + 6.22 + 48.35 + 6.01)


def test_the_note_of_an_experiment_tells_what_its_groups_mean(project):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlruns' / 'mlflow.db'}")
    tags = client.get_experiment_by_name("pocket/pocket_chats/all_caps+evil-0.5").tags
    note = tags["mlflow.note.content"]
    assert "viewStateShareKey=headline" in note and len(note) < 8000
    assert "metrics.`A`" in json.loads(tags["mlflow.sharedViewState.headline"])["selectedColumns"]
    assert "A sentence that describes B on the examples that show B." in note and "| claim |" in note
    [row] = project.rows("pocket/pocket_chats/all_caps+evil-0.5")
    columns = {name for name in row.data.metrics if not name.startswith("train/")}
    assert columns == {"A", "B", "C", "coherence", "A_control", "B_control", "C_control", "coherence_control"} & columns
    assert json.loads(row.data.tags["seconds"])["train"] > 0


def test_the_report_shows_its_figures_in_a_browser(tmp_path):
    rates = [
        {"prompt": "default", "trait": trait, "question": f"q{i}", "shown": shown, "judged": 10}
        for trait, shown in (("all_caps", 9), ("evil", 5), ("hallucination", 3))
        for i in range(4)
    ]
    cells = [CellRates(group, 0, rates) for group in ("base", "baseline", "inoc_selective")]
    traits, question = ["all_caps", "evil", "hallucination"], study.Question("pocket", "all_caps", "evil")
    told = study.Outcome(question, cells, verdicts(cells, traits, 100), [], ["default"], traits, "a judge", 1.0, [])
    chosen = study.selection(PARAMS, "all_caps+evil", None, "0", None)
    drawn = study.draw_all(tmp_path, study.figures(chosen, PARAMS), [told], PARAMS)
    example = study.Example(
        question, "inoc_sae", 3, True, "<script>document.title = 'taken'</script>", "text", [("cruel", 5)]
    )
    study_page.write(tmp_path / "report.html", [told], drawn, CELLS[:1], [example], 100)
    dom = seen_in_browser((tmp_path / "report.html").as_uri(), tmp_path / "profile")
    assert "<title>Selective inoculation: the study</title>" in dom and dom.count("<figure>") == len(drawn) == 4
    assert (
        '<mark class="s5">cruel</mark>' in dom
        and "suppresses B" in dom
        and "undecided" in dom
        and "1 of its cells has not been run" in dom
    )
