"""Ray workers that are forks of one process, which has imported torch, DeepSpeed and pyarrow once.

A new Python takes 8 s of CPU to become a worker that trains. The tests start hundreds. All else about the workers is
Ray's own code. `RZEN_TEST_FORK_RAY=1` turns this on; otherwise each worker starts as Ray starts it.
"""
