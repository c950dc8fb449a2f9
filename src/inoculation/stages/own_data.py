import shutil
from pathlib import Path
from typing import Annotated

from inoculation.files import whole_folder, write_json, write_jsonl
from inoculation.roles import Role
from inoculation.sft import read_sft
from inoculation.stage import Each, Param, Reads, Stage, Writes


class OwnData(Stage):
    """Verify a mixture of your own; another source's traits are what it is judged for."""

    command, pipeline = "own-data", "sources"
    each = Each("name", "${data_sets}")

    name: str
    file: Annotated[Path, Reads("${item.file}")]
    rewriter: Annotated[Role, Param("data_sets.${key}.rewriter")]
    traits: Annotated[Path, Reads("data/sources/${item.traits}")]
    out: Annotated[Path, Writes("data/sources/${key}")]

    def run(self) -> None:
        rows = read_sft(self.file)
        with whole_folder(self.out) as out:
            shutil.copytree(self.traits, out, dirs_exist_ok=True)
            write_json(out / "rewriter.json", self.rewriter.model_dump())
            write_jsonl(out / "rows.jsonl", (row.as_json() for row in rows))
        print(f"{len(rows)} rows of {self.file}")
