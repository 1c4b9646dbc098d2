import os
import signal
import subprocess

from jaxdist.launch.supervising import stopped


def test_a_process_is_stopped_from_sigstop_to_sigcont():
    with subprocess.Popen(["sleep", "600"]) as process:
        assert not stopped.is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert stopped.is_stopped(process.pid)
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)
        assert not stopped.is_stopped(process.pid)
        process.kill()
    assert not stopped.is_stopped(process.pid), "a process that has ended"
