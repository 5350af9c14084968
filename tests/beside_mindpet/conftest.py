from tests.beside_mindpet.real import is_there

# MindPet is installed by `make test-mindpet` alone.
collect_ignore_glob = [] if is_there() else ["test_*.py"]
