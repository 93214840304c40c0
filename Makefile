# The two commands of the README. Each sets everything up first; a finished set-up is skipped in a moment.
SHELL := /bin/bash
VENV  := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

.PHONY: train test lint audit site setup dist clean

train:                  ## train a ResNet on real images: on torch alone, then 2 ranks under deepspeed (ZeRO-1) and Horovod
	launch/quickstart.sh

test: setup lint        ## lint, types, import direction and the tests; PYTEST=--everything adds the slow ones
	launch/run_tests.sh $(PYTEST)

lint: setup
	ruff check . && ruff format --check . && mypy && lint-imports

audit: setup            ## known vulnerabilities of the pinned versions; needs the network, not part of the tests
	launch/audit.sh

site: setup             ## the documents and the interfaces as a site, in build/site
	NO_MKDOCS_2_WARNING=1 mkdocs build

setup:
	launch/setup.sh

dist:                   ## wheel and source release into dist/; the wheel serves every supported torch and Python
	launch/dist.sh

clean:                  ## removes the environment; runs/ and data/ stay
	rm -rf .venv build *.egg-info
