# Every task of the project, one line each; `make` lists them. A task makes the environment it needs, so a fresh machine
# with Python 3.11 or later and make runs any of them.

PYTHON ?= python3
# Where pip looks for torch beside its usual index. Empty takes the default build, which on Linux is the large CUDA one;
# https://download.pytorch.org/whl/cpu is PyTorch's own index of the small CPU builds: make demo TORCH_INDEX=<that>
TORCH_INDEX ?=
# More arguments for the program a task runs: make demo ARGS="--model deepfm"
ARGS ?=
# Shards of `make up`, its workers, and what these train.
PS ?= 2
WORKERS ?= 0
JOB ?= trilith_services.demo.job:deepfm
# Parts that `make quick` tests; empty: those that have changed.
PART ?=
# Processes that share the tests.
JOBS ?= 2

BIN := .venv/bin
VENV := .venv/.stamp
PROTO_BIN := .venv-proto/bin
PROTO_VENV := .venv-proto/.stamp
EXTRAS_BIN := .venv-extras/bin
EXTRAS_VENV := .venv-extras/.stamp
PYTEST := $(BIN)/python -m pytest
# The files that take longest come first, and stay there, so that no process is left with one at the end.
TIERS := tests/integration tests/congruence tests/conformance tests/golden tests/unit

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-jobs quick test-extras test-gpu quality test-nojit fuzz lint format docs proto proto-check wheel-check \
  conformance bench up down compose-check clean

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)  ## make the environment (every other task does so itself)

demo: $(VENV)  ## train a click model on MovieLens with two PS and two workers
	$(BIN)/trilith demo $(ARGS)

test: $(VENV)  ## all tests that need neither docker nor a quiet machine, but for test-jobs
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not jobs" $(TIERS) $(ARGS)

test-jobs: $(VENV)  ## whole jobs of the Estimator: several workers, kills, exports, entries, recipes (minutes)
	$(PYTEST) -n $(JOBS) -m jobs tests/integration tests/unit/test_conventions.py $(ARGS)

quick: $(VENV)  ## unit tests of what has changed since main, or of PART=engine|data|client|serving|nn|estimator|ops (a minute)
	$(BIN)/python -m tests.quick $(PART) $(ARGS)

test-extras: $(EXTRAS_VENV)  ## the tests of packages that Trilith works with and does not need: pandas, W&B, ... (a minute)
	TRILITH_TEST_EXTRAS=1 $(EXTRAS_BIN)/python -m pytest -n $(JOBS) \
	  tests/unit/test_data_arrow.py tests/unit/test_estimator_callbacks.py tests/unit/test_estimator_source.py $(ARGS)

test-gpu: $(VENV)  ## the tests that need a CUDA device, on a machine that has one
	$(PYTEST) -m gpu tests/unit $(ARGS)

quality: $(VENV)  ## the demo on three seeds, also pipelined, is as good as plain torch (minutes)
	$(PYTEST) -s tests/quality $(ARGS)

test-nojit: $(VENV)  ## the unit tests with kernels as plain Python: breakpoints and coverage work
	NUMBA_DISABLE_JIT=1 $(PYTEST) -n $(JOBS) --dist loadfile tests/unit $(ARGS)

lint: $(VENV)  ## format check, lint, types, import directions, the page of flags
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.reference --check

format: $(VENV)  ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)  ## write docs/commands.md and docs/metrics.md: every flag, environment variable and metric
	$(BIN)/python -m tests.reference

proto: $(PROTO_VENV)  ## write the stubs beside the .proto files
	$(call generate,protos)

proto-check: $(PROTO_VENV)  ## fail if the committed stubs are stale
	@rm -rf build/proto-check && mkdir -p build/proto-check
	@$(call generate,build/proto-check)
	@cd build/proto-check/trilith_proto && stale=0; \
	for stub in *_pb2*; do \
	  cmp -s "$$stub" "$(CURDIR)/protos/trilith_proto/$$stub" || { echo "stale: protos/trilith_proto/$$stub (run make proto)"; stale=1; }; \
	done; \
	for stub in "$(CURDIR)"/protos/trilith_proto/*_pb2*; do \
	  test -e "$$(basename "$$stub")" || { echo "orphan: $$stub"; stale=1; }; \
	done; \
	test $$stale = 0 && echo "the stubs are fresh"

wheel-check: $(VENV)  ## build the wheel and check that it holds the three packages, the license and nothing else
	@rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(BIN)/python -c 'import pathlib, sys, zipfile; \
	wheel, = pathlib.Path("build/wheel").glob("trilith-*.whl"); \
	names = zipfile.ZipFile(wheel).namelist(); \
	tops = sorted({name.split("/")[0] for name in names if ".dist-info/" not in name}); \
	licenses = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]; \
	print(wheel.name, tops, licenses); \
	sys.exit(tops != ["trilith", "trilith_proto", "trilith_services"] or len(licenses) != 1)'

fuzz: $(VENV)  ## damage and forge saved files for a minute: readers refuse them, none crashes (ARGS="--seconds 1800")
	$(BIN)/python -m tests.fuzz.files $(ARGS)

conformance: $(VENV)  ## run the vector files: engine, worker_ops, data
	@for part in engine worker_ops data; do \
	  echo "$$part:"; $(BIN)/python -m tests.conformance $$part tests/golden/conformance/$$part.json || exit 1; \
	done

bench: $(VENV)  ## measure against references in the same run; writes build/bench.json (wants a quiet machine)
	@mkdir -p build
	$(BIN)/python -m tests.bench $(ARGS)

up: $(VENV)  ## start a local cluster in the background (PS=2 WORKERS=0 JOB=MODULE:JOB); make down stops it
	@mkdir -p build
	@if test -e build/up.pid && kill -0 "$$(cat build/up.pid)" 2>/dev/null; then echo "already up: $$(cat build/up.address)"; exit 1; fi
	@rm -f build/up.address
	@$(BIN)/trilith up --ps $(PS) $(if $(filter-out 0,$(WORKERS)),--job $(JOB) --workers $(WORKERS)) --address-file build/up.address $(ARGS) >build/up.log 2>&1 </dev/null & echo $$! >build/up.pid
	@while ! test -e build/up.address; do \
	  kill -0 "$$(cat build/up.pid)" 2>/dev/null || { tail build/up.log; rm -f build/up.pid; exit 1; }; \
	  sleep 0.2; \
	done
	@echo "up: $$(cat build/up.address) (log: build/up.log; make down stops it)"

down:  ## stop what `make up` started
	@if test -e build/up.pid && kill -TERM "$$(cat build/up.pid)" 2>/dev/null; then \
	  while kill -0 "$$(cat build/up.pid)" 2>/dev/null; do sleep 0.2; done; echo stopped; \
	else echo "nothing is up"; fi
	@rm -f build/up.pid build/up.address

compose-check: $(VENV)  ## build the image, and test the cluster of docker-compose.yml (minutes; gets docker if there is none)
	TORCH_INDEX=$(TORCH_INDEX) .ci/compose $(ARGS)

clean:  ## remove environments, caches and build results
	rm -rf .venv .venv-proto .venv-extras build dist wheelhouse .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	find protos client services tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: $(PYTHON) cannot make environments (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "making .venv: pip fetches torch and what else is missing, which can take some minutes and gigabytes"
	@$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements.lock -e '.[torch,dev]'
	@touch $@

# It sees what .venv has, and adds to it.
$(EXTRAS_VENV): $(VENV)
	@test -x $(EXTRAS_BIN)/python || $(BIN)/python -m venv .venv-extras
	@$(BIN)/python -c 'import pathlib, sysconfig; \
	seen = "import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"); \
	pathlib.Path(next(pathlib.Path(".venv-extras").glob("lib/python*/site-packages")), "venv.pth").write_text(seen)'
	$(EXTRAS_BIN)/python -m pip install --quiet -c requirements.lock \
	  datasets mlflow-skinny pandas polars tensorboard torchdata wandb
	@touch $@

# The oldest versions we support: generated code refuses a runtime older than its generator.
$(PROTO_VENV): Makefile
	@test -x $(PROTO_BIN)/python || $(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/python -m pip install --quiet grpcio-tools==1.68.1 mypy-protobuf==3.6.0
	@touch $@

# $(call generate,DIR): messages for every .proto, services for those that have any.
define generate
PATH="$(CURDIR)/$(PROTO_BIN):$$PATH" $(PROTO_BIN)/python -m grpc_tools.protoc -I protos \
  --python_out=$(1) --mypy_out=quiet:$(1) protos/trilith_proto/*.proto && \
PATH="$(CURDIR)/$(PROTO_BIN):$$PATH" $(PROTO_BIN)/python -m grpc_tools.protoc -I protos \
  --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) \
  protos/trilith_proto/ps.proto protos/trilith_proto/parameter_sync.proto protos/trilith_proto/serving.proto
endef
