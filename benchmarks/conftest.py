def pytest_addoption(parser):
    parser.addoption("--record", help="append the results to this CSV file, relative to benchmarks/")
