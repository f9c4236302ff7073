"""Ray workers that are forks of one process, which has imported Ray, torch and DeepSpeed once.

A new Python takes 2 s of CPU to become a worker of Ray, and 8 s to become one that trains. The tests start hundreds.
All else about the workers is Ray's own code. `RZEN_TEST_FORK_RAY=0` starts each one as Ray does. Clusters that tests
start with `ray start` do so too.
"""
