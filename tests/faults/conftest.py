import pytest

from tests.job_process import project_in, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The project whose run nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    run(project_in(folder))
    return folder
