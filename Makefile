# SPDX-License-Identifier: Apache-2.0

# What is downloaded or built once, outside the checkout.
export KILN_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kiln
CARGO ?= cargo
TOOLS := $(KILN_CACHE)/tools
# Static programs are linked for an explicit target, so that build scripts stay dynamic.
TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
STATIC := --profile small --target $(TARGET) -- -C target-feature=+crt-static
# Tests install images of programs that took less time to build.
TEST_IMAGE := --target $(TARGET) -- -C target-feature=+crt-static -C strip=symbols
IMAGE := --release $(TEST_IMAGE)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-14s %s\n", $$1, $$2 }'

.PHONY: deps
deps: ## Install containerd, runsc and what else the demo and the tests run against
	@tests/deps/install.sh

.PHONY: build
build: ## The shim, pause and the router as they are installed, static and small, in target/small
	$(CARGO) rustc -p kiln-shim --bin containerd-shim-kiln-v2 $(STATIC)
	@# Renamed, because the last one may be running.
	mkdir -p target/small && cp target/$(TARGET)/small/containerd-shim-kiln-v2 target/small/.shim
	mv target/small/.shim target/small/containerd-shim-kiln-v2
	$(CARGO) rustc -p kiln-pause $(STATIC) -C relocation-model=static
	cp target/$(TARGET)/small/kiln-pause target/small/kiln-pause
	$(CARGO) rustc -p kiln-router --bin kiln-router $(STATIC)
	cp target/$(TARGET)/small/kiln-router target/small/kiln-router

.PHONY: images
images: deps build ## Images of agent, controller and router for a cluster, in target/images (TAG=dev)
	$(CARGO) rustc -p kiln-node-agent --bin kiln-node-agent $(IMAGE)
	$(CARGO) rustc -p kiln-controller --bin kiln-controller $(IMAGE)
	$(CARGO) run -q -p kiln-images -- release --out target/images --tag $(or $(TAG),dev) \
		--programs target/$(TARGET)/release --programs target/small --programs $(KILN_CACHE)/bin

.PHONY: guest
guest: ## Build the static programs that tests run in Pods
	$(CARGO) rustc -p kiln-guest $(STATIC) -C relocation-model=static
	$(CARGO) rustc -p kiln-probe $(STATIC) -C relocation-model=static
	mkdir -p target/small && cp target/$(TARGET)/small/kiln-probe target/small/kiln-probe

.PHONY: demo-node
demo-node: deps build guest ## Run Pods in gVisor on a private containerd, and show what happens
	$(CARGO) run -q -p kiln-tests --bin kiln-demo

.PHONY: demo
demo: deps build guest ## Agent Sandbox on a Kubernetes of its own: pool, claim, code in a warm sandbox
	$(CARGO) build -q -p kiln-controller -p kiln-node-agent -p kiln-cluster
	@target/debug/kiln-mission

.PHONY: cluster-up
cluster-up: deps build guest ## A whole Kubernetes of one node with Kiln in it, until make cluster-down
	@$(CARGO) run -q -p kiln-cluster --bin kiln-cluster -- up

.PHONY: cluster-down
cluster-down: ## End that cluster and take all of it away
	@$(CARGO) run -q -p kiln-cluster --bin kiln-cluster -- down

.PHONY: manifests
manifests: ## The CustomResourceDefinitions in deploy/crds, from the types in crds/
	$(CARGO) run -q -p kiln-crds -- deploy/crds

.PHONY: check
check: $(TOOLS)/bin/cargo-deny ## Format, lints, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --exclude kiln-guest --all-targets -- -D warnings
	$(CARGO) run -q -p kiln-crds -- --check deploy/crds
	$(CARGO) fetch --quiet --locked
	$(TOOLS)/bin/cargo-deny --offline check bans licenses sources

.PHONY: test-unit
test-unit: deps ## Tests that need no containerd; those of the runtimes need root
	$(CARGO) test -p runsc-wrapper -p kiln-shim -p kiln-images -p kiln-crds -p kiln-controller -p kiln-agent-api -p kiln-node-agent -p kiln-router --all-features -- --include-ignored

.PHONY: fuzz
fuzz: ## What comes from outside with anything in it, FUZZ_SECONDS (60) for each
	BOLERO_RANDOM_TEST_TIME_MS=$$(($(or $(FUZZ_SECONDS),60) * 1000)) \
		$(CARGO) test --release -p runsc-wrapper -p kiln-shim -p kiln-agent-api --lib -- any_ answered

.PHONY: test-node
test-node: deps build guest ## Suites against real containerd, runsc and runc
	$(CARGO) build -p kiln-shim -p kiln-node-agent -p kilnctl
	$(CARGO) test -p kiln-tests

SOAK = SOAK_SECONDS=$(or $(SOAK_SECONDS),1800)

.PHONY: soak
soak: soak-node ## Pods, then claims, of all kinds at random, with faults, for SOAK_SECONDS (1800) each; SOAK_SEED repeats one
	$(CARGO) build -p kiln-controller
	$(SOAK) $(CARGO) test -p kiln-cluster --test controller -- soak:: --nocapture

.PHONY: soak-node
soak-node: deps build guest ## The Pods of it
	$(CARGO) build -p kiln-shim -p kiln-node-agent
	$(SOAK) $(CARGO) test -p kiln-tests --test soak -- --nocapture

.PHONY: mutate
mutate: deps build guest ## Takes out one guard after the other; a test must notice each
	$(CARGO) test -p kiln-tests --test isolation --no-run
	CARGO=$(CARGO) tests/mutate.sh

.PHONY: test-controller
test-controller: deps ## The controller on a real etcd and kube-apiserver
	$(CARGO) build -p kiln-controller
	$(CARGO) test -p kiln-cluster --lib --test controller

.PHONY: test-cluster
test-cluster: deps build guest ## What kubectl does to Pods in gVisor, on a whole cluster
	$(CARGO) build -p kiln-controller -p kiln-node-agent
	$(CARGO) test -p kiln-cluster --test cluster

.PHONY: test-deploy
test-deploy: deps ## Policies, chart and classes on a real apiserver; dashboards and alerts
	$(CARGO) build -p kiln-controller
	$(CARGO) test -p kiln-cluster --test deploy --test observe

.PHONY: test-kilnctl
test-kilnctl: deps ## What kilnctl does to clusters of its own
	$(CARGO) build -p kilnctl
	$(CARGO) test -p kiln-cluster --test kilnctl -- $(KILNCTL_CASES)

.PHONY: test-deploy-node
test-deploy-node: deps build ## A cluster whose node installs itself, is upgraded, and is left as it was
	$(CARGO) rustc -p kiln-node-agent --bin kiln-node-agent $(TEST_IMAGE)
	$(CARGO) rustc -p kiln-controller --bin kiln-controller $(TEST_IMAGE)
	$(CARGO) build -p kilnctl
	$(CARGO) test -p kiln-cluster --test deploy_node

.PHONY: kata-e2e
kata-e2e: deps build guest ## A Pod in a virtual machine of Kata's, where the machine has KVM and Kata
	$(CARGO) test -q -p kiln-tests --test kata-e2e

.PHONY: critest
critest: deps build guest ## The CRI conformance suite with our handler, cold and adopted: tests/critest.md
	$(CARGO) build -q -p kiln-shim -p kiln-node-agent
	$(CARGO) build -q -p kiln-tests --bin kiln-critest
	@# Side by side: most of it is waiting.
	target/debug/kiln-critest --handler gvisor >target/critest-cold.log 2>&1 & cold=$$!; \
	target/debug/kiln-critest --handler gvisor-warm; warm=$$?; \
	wait $$cold; cold=$$?; cat target/critest-cold.log; exit $$((cold + warm))

.PHONY: test
test: KILNCTL_CASES = refused::
test: check test-unit test-controller test-deploy test-kilnctl test-node test-cluster critest ## Everything above but test-deploy-node; of test-kilnctl what is refused

.PHONY: bench-node
bench-node: deps build guest ## Ours, gVisor's Go shim and runc side by side: target/bench/node.json
	$(CARGO) run -q --release -p kiln-tests --bin kiln-bench

.PHONY: bench-warm
bench-warm: deps build guest ## Pods in sandboxes booted ahead, beside cold ones: target/bench/warm.json
	$(CARGO) build -q --release -p kiln-node-agent -p kiln-controller -p kiln-cluster
	$(CARGO) run -q --release -p kiln-tests --bin kiln-bench-warm
	$(CARGO) run -q --release -p kiln-cluster --bin kiln-bench-apply

.PHONY: bench-claims
bench-claims: deps ## Claims against a pool, and what they cost: target/bench/claims.json
	$(CARGO) build --release -p kiln-controller -p kiln-cluster
	KILN_CONTROLLER=$(CURDIR)/target/release/kiln-controller target/release/kiln-bench-claims

.PHONY: bench-files
bench-files: deps build guest ## Files with and without directfs: target/bench/files.json
	$(CARGO) run -q --release -p kiln-tests --bin kiln-bench-files

.PHONY: bench
bench: bench-node bench-warm bench-claims ## All benchmarks

.PHONY: clean
clean: ## Remove what was built here; the cache stays
	$(CARGO) clean

$(TOOLS)/bin/cargo-deny:
	@# Not optimised: it builds in half of the time, and is used once.
	CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install --debug --quiet --locked --root $(TOOLS) \
		--target-dir $(KILN_CACHE)/build/tools cargo-deny@0.20.2
