import pytest

from tests.job_process import project_in, run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The project whose run nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    run(project_in(folder))
    return folder


# TEMPORARY
def pytest_configure(config):
    config.option.maxfail = 100


def pytest_runtest_logreport(report):
    with open("/tmp/fx/live.log", "a") as file:
        if report.when == "call" or report.failed:
            file.write(f"{report.nodeid} {report.when} {report.outcome} {report.duration:.1f}\n")
        if report.failed:
            file.write(str(report.longrepr)[-6000:] + "\n")
