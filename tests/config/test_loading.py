import pathlib
import sys
import textwrap

import pytest

from jaxdist.config import loading
from jaxdist.errors import ConfigError, UserError


def write(folder, text, name="given.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


LOADS = """
    import tiny_experiment
    def get_config():
        return tiny_experiment.get_config()
"""


def test_a_file_is_loaded_and_named_after_itself_unless_it_names_itself(tmp_path):
    assert loading.load_experiment(write(tmp_path, LOADS)).name == "tiny"
    nameless = LOADS.replace(
        "tiny_experiment.get_config()", "dataclasses.replace(tiny_experiment.get_config(), name='')"
    )
    path = write(tmp_path, "    import dataclasses\n" + nameless, name="my_own.py")
    assert loading.load_experiment(path).name == "my_own"


def test_a_file_may_import_its_neighbour_and_a_main_block_does_not_run(tmp_path):
    write(tmp_path, LOADS, name="neighbour_of_given.py")
    path = write(
        tmp_path,
        """
        from neighbour_of_given import get_config
        if __name__ == "__main__":
            raise RuntimeError("this is no script now")
        """,
    )
    assert loading.load_experiment(path).global_batch_size == 16


BROKEN = {
    "syntax": ("def get_config(:\n", r"given\.py cannot be loaded: SyntaxError: .*line 1"),
    "import": (
        "\nimport no_such_module_here\n",
        r"ModuleNotFoundError: No module named .*\(.*given\.py:2, in <module>\)",
    ),
    "relative": ("from .other import x\n", r"given\.py cannot be loaded: .*relative import.* by their names alone"),
    "notebook": ("get_ipython().magic('x')\n", r"cannot be loaded: NameError: .* Remove the commands of the notebook"),
    "raises": ("x = 1\n\nx / 0\n", r"cannot be loaded: ZeroDivisionError: .*given\.py:3, in <module>"),
    "absent": ("x = 1\n", r"defines get_config\(\); .*given\.py does not"),
    "misspelt": ("def get_confg():\n    pass\n", r"does not\. Did you mean 'get_confg'\?"),
    "no function": ("get_config = 3\n", r"defines get_config\(\); .*given\.py has 3 in its place"),
    "moves": (
        "import os\ndef get_config():\n    os.chdir('/')\n",
        r"leaves the working directory as it is.*given\.py changed it to /\. Build paths",
    ),
    "wrong type": ("def get_config():\n    return {'seed': 0}\n", r"must return a jaxdist\.Experiment.* returned dict"),
    "async": ("async def get_config():\n    pass\n", r"returned coroutine"),
    "none": ("def get_config():\n    pass\n", r"returned NoneType"),
    "fails": (
        "def get_config():\n    return {}['x']\n",
        r"get_config\(\) of .*given\.py failed: KeyError: 'x' \(.*given\.py:2, in get_config\)",
    ),
    "refused": (
        "import jaxdist\ndef get_config():\n    return jaxdist.Optimizer(name='sgd', learning_rate=-1)\n",
        r"failed: ValueError: optimizer\.learning_rate must be at least 0.*given\.py:3, in get_config",
    ),
    "incomplete": (
        "import jaxdist\ndef get_config():\n    return jaxdist.Experiment()\n",
        r"Experiment needs the required setting 'model'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_clear_message(tmp_path, what):
    text, message = BROKEN[what]
    before = pathlib.Path.cwd()
    path = tmp_path / "given.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        loading.load_experiment(str(path))
    assert pathlib.Path.cwd() == before
    assert isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value).strip()


def test_a_missing_file_a_folder_and_no_python_file(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*absent\.py' there is none"):
        loading.load_experiment(str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="it is something else"):
        loading.load_experiment(str(tmp_path))
    with pytest.raises(ConfigError, match="it is something else"):
        loading.load_experiment(write(tmp_path, "seed: 3", name="config.yaml"))


def test_a_neighbour_is_found_when_get_config_imports_it_and_the_files_own_path_entry_stays(tmp_path):
    (tmp_path / "extra").mkdir()
    write(tmp_path, LOADS, name="late_neighbour.py")
    write(tmp_path / "extra", "here = True", name="in_extra_folder.py")
    path = write(
        tmp_path,
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "extra")!r})
        def get_config():
            import in_extra_folder
            from late_neighbour import get_config
            return get_config()
        """,
        name="imports_late.py",
    )
    assert loading.load_experiment(path).name == "tiny"
    assert {str(tmp_path), str(tmp_path / "extra")} <= set(sys.path)


def test_the_place_of_an_error_is_told_when_the_path_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "def get_config():\n    return 1 / 0", name="relative.py")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: division by zero \(relative\.py:2, in get_config\)"):
        loading.load_experiment("relative.py")
