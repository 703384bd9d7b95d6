"""Where chains are read from: files, names of chains that come with the package, and what is written about them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from latentmas.chain.agent import Agent
from latentmas.chain.stages import check_chain
from latentmas.chain_files.reader import builtin_chains, read_builtin, read_chain, serial
from yaml_texts import JUDGER

from latentmas_kernels.errors import LatentMASError

CHAINS = Path(__file__).parents[2] / "python" / "latentmas" / "chain_files"


# ---- sources -------------------------------------------------------------------------------------------------------------


def test_shipped_chains_are_read_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert builtin_chains() == ["debate", "hierarchical", "mix", "sequential", "single", "text"]
    for name in builtin_chains():
        chain = read_chain(name, latent_steps=3, max_new_tokens=7)
        assert chain == read_builtin(name, latent_steps=3, max_new_tokens=7)
        assert (chain.name, chain.source, chain.budget) == (name, name, None)
        assert chain.description
        assert {agent.steps for agent in serial(chain.agents)} <= {3, 7}


def test_a_file_comes_before_a_shipped_name_and_a_folder_does_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("debate").write_text("agents:\n" + JUDGER.replace("Answer.", "Answer {question}."))
    Path("single").mkdir()
    assert [agent.name for agent in read_chain("debate").agents] == ["judger"]
    assert len(read_builtin("debate").agents) == 3
    assert [agent.name for agent in read_chain("single").agents] == ["solver"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.yaml", "got chain 'nowhere.yaml', which is no file; give a file"),
        ("debte", "got chain 'debte', which is no file; did you mean debate? Give a file"),
        ("debate.yaml", "got chain 'debate.yaml', which is no file; did you mean debate? Give a file"),
        (".", "got chain '.', which is a folder; give a file"),
        ("../chains/debate", "got chain '../chains/debate', which is no file; did you mean debate? Give a file"),
    ],
)
def test_a_source_that_is_not_there(monkeypatch, tmp_path, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_chain(source)
    assert str(error.value).endswith(
        "or a chain that comes with the package: debate, hierarchical, mix, sequential, single, text"
    )


def test_without_pydantic_a_chain_says_what_to_install(monkeypatch):
    """Shipped ones, too; agents in Python need none."""
    for module in ("parser", "schema"):
        monkeypatch.delitem(sys.modules, f"latentmas.chain_files.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(LatentMASError, match=r"needs pydantic, .* pip install 'pydantic>=2.9,<3', .* latentmas.Agent"):
        read_chain("single")
    assert check_chain([Agent("solver", "{question}", max_new_tokens=1)]) == []


def test_reading_a_chain_leaves_torch_alone():
    code = (
        "import sys; from latentmas import read_chain; read_chain('debate'); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the shipped files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "sequential", "hierarchical", "debate", "mix"])
def test_shipped_files_say_where_they_come_from(name):
    assert "arXiv 2511.20639" in (CHAINS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("path", sorted(CHAINS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_begin_with_a_comment(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", ["hierarchical", "debate"])
def test_agents_of_a_shipped_group_begin_alike(name):
    """What they have in common is computed once."""
    groups = [entry for entry in read_builtin(name).agents if isinstance(entry, list)]
    assert groups
    for group in groups:
        assert all(agent.prompt.startswith("Question: {question}\n\n") for agent in group)
        assert len({agent.prompt for agent in group}) == len(group)


def test_rounds_of_the_shipped_debate():
    names = [agent.name for agent in serial(read_builtin("debate").agents)]
    assert names == ["first 1", "second 1", "first 2", "second 2", "judger"]
    assert "round 2 of a debate" in read_builtin("debate").agents[1][0].text("?")


def test_the_shipped_mix_thinks_and_writes_in_turns():
    agents = read_builtin("mix", latent_steps=3, max_new_tokens=7).agents
    assert [(agent.name, agent.thinks, agent.reads_notes) for agent in agents] == [
        ("planner", True, False), ("writer", False, False), ("critic", True, False), ("judger", False, False),
    ]  # fmt: skip


# ---- the documentation ---------------------------------------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "chains.md").read_text()


def test_files_in_the_documentation_are_chains(tmp_path):
    file = tmp_path / "chain.yaml"

    def read(text):
        file.write_text(text)
        return read_chain(file)

    first, second, third = [read(text) for text in re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)]
    assert [agent.name for agent in first.agents] == ["planner", "judger"]
    assert [agent.name for agent in serial(second.agents)] == ["pro 1", "con 1", "pro 2", "con 2", "judger"]
    assert [agent.model for agent in third.agents] == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"]


def test_faults_in_the_documentation_are_told_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text("""\
latent_steps: 1_000
fields: {domain: algebra}
agents:
  - name: critic
    prompt: |-
      {domian} {{domain}}




    output: latent
    latent_steps: ten
  - {name: judger, output: text, prompt: x}
""")
    with pytest.raises(ValueError, match="critic") as error:
        read_chain("chain.yaml")
    assert [line for line in DOCS.splitlines() if line.startswith("    chain.yaml:")] == [
        f"    {line}" for line in str(error.value).splitlines()
    ]


def test_the_documentation_names_every_shipped_chain():
    assert re.findall(r"^\| `(\w+)` \|", DOCS.split("## Chains that come")[1], re.MULTILINE) == [
        "single", "text", "sequential", "hierarchical", "debate", "mix",
    ]  # fmt: skip
