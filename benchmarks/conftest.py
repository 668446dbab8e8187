def pytest_addoption(parser):
    parser.addoption("--record", help="append the results to this CSV file, relative to benchmarks/")
    parser.addoption("--at-leisure", action="store_true", help="5 rounds for the large cases too, and no time limit")
