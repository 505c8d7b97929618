import pytest

from tests.job_process import kill_what_is_left, project_in, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The project whose run nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    run(project_in(folder))
    return folder


@pytest.fixture(autouse=True)
def nothing_outlives_a_failed_test():
    yield
    kill_what_is_left()
