# SPDX-License-Identifier: Apache-2.0

# What is downloaded or built once, outside the checkout.
export KILN_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kiln
CARGO ?= cargo
TOOLS := $(KILN_CACHE)/tools
# .cargo/config.toml names the target and the flags; RUSTFLAGS of the caller would replace the flags.
CRT_STATIC := -C target-feature=+crt-static
ifneq ($(RUSTFLAGS),)
export RUSTFLAGS := $(subst $(CRT_STATIC),,$(RUSTFLAGS)) $(CRT_STATIC)
endif
OUT := target/$(or $(CARGO_BUILD_TARGET),$(shell rustc -vV | sed -n 's/^host: //p'))
# What is installed is the same wherever it was built.
HERE := $(CURDIR)
CRATES := $(patsubst %/,%,$(or $(CARGO_HOME),$(HOME)/.cargo))
NO_PATHS := --remap-path-prefix=$(CRATES)=/cargo --remap-path-prefix=$(HERE)=/kiln
build release: export RUSTFLAGS := $(subst $(NO_PATHS),,$(or $(RUSTFLAGS),$(CRT_STATIC))) $(NO_PATHS)
# Where programs are as they are installed.
SMALL := target/small
# Only what is new, because the last one may be running.
INSTALL = mkdir -p $(SMALL) && install -C -m 0755
# Where the programs of images are; with ARM64=1 those for arm64 too.
ARM64_TARGET := aarch64-unknown-linux-gnu
IMAGES := $(OUT)/release $(SMALL) $(KILN_CACHE)/bin
IMAGES += $(if $(ARM64),target/$(ARM64_TARGET)/release target/arm64 $(KILN_CACHE)/arm64)
# What is tested is always built with the same features, so that nothing is compiled twice.
ALL := --workspace --exclude kiln-guest --all-features

.PHONY: help
help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-14s %s\n", $$1, $$2 }'

.PHONY: deps
deps: ## Install containerd, runsc and what else the demo and the tests run against
	@tests/deps/install.sh

.PHONY: build
build: ## The shim, pause and the router as they are installed, static and small, in target/small
	$(CARGO) build --locked --profile small -p kiln-shim --bin containerd-shim-kiln-v2
	$(CARGO) rustc --locked --profile small -p kiln-pause -- -C relocation-model=static
	$(CARGO) build --locked --profile small -p kiln-router --bin kiln-router
	$(INSTALL) $(addprefix $(OUT)/small/,containerd-shim-kiln-v2 kiln-pause kiln-router) $(SMALL)

.PHONY: images
images: deps release $(if $(ARM64),arm64) ## Images of agent, controller and router for a cluster, in target/images (TAG=dev, ARM64=1)
	$(CARGO) run -q --locked -p kiln-images -- release --out target/images --tag $(or $(TAG),dev) \
		$(addprefix --programs ,$(IMAGES))

.PHONY: release
release: build ## The programs of images
	$(CARGO) rustc --locked --release -p kiln-node-agent --bin kiln-node-agent -- -C strip=symbols
	$(CARGO) rustc --locked --release -p kiln-controller --bin kiln-controller -- -C strip=symbols
	@# 1 says that nothing was found, and 2 that it was not looked for.
	grep --text --files-with-matches --fixed-strings -e '$(CRATES)/' -e '$(HERE)/' -e /.rustup/ \
		$(addprefix $(SMALL)/,containerd-shim-kiln-v2 kiln-pause kiln-router) \
		$(addprefix $(OUT)/release/,kiln-node-agent kiln-controller); [ $$? -eq 1 ]

.PHONY: arm64
arm64: ## Those for arm64, made on another machine: in target/aarch64-…/release and target/arm64
	tests/deps/install.sh runsc-arm64
	rustup target add $(ARM64_TARGET)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		$(MAKE) release CARGO_BUILD_TARGET=$(ARM64_TARGET) SMALL=target/arm64

.PHONY: guest
guest: ## Build the static programs that tests run in Pods
	@# As tests/images builds it.
	$(CARGO) rustc --profile small -p kiln-guest -- $(CRT_STATIC) -C relocation-model=static
	$(CARGO) rustc --profile small -p kiln-probe -- -C relocation-model=static
	$(INSTALL) $(OUT)/small/kiln-probe $(SMALL)

.PHONY: programs
programs: ## What tests run, built in less time than what is installed
	$(CARGO) build $(ALL) --bins

.PHONY: demo-node
demo-node: deps build guest programs ## Run Pods in gVisor on a private containerd, and show what happens
	@$(OUT)/debug/kiln-demo

.PHONY: demo
demo: deps build guest programs ## Agent Sandbox on a Kubernetes of its own: pool, claim, code in a warm sandbox
	@$(OUT)/debug/kiln-mission

.PHONY: cluster-up
cluster-up: deps build guest programs ## A whole Kubernetes of one node with Kiln in it, until make cluster-down
	@$(OUT)/debug/kiln-cluster up

.PHONY: cluster-down
cluster-down: programs ## End that cluster and take all of it away
	@$(OUT)/debug/kiln-cluster down

.PHONY: manifests
manifests: ## The CustomResourceDefinitions in deploy/crds, from the types in crds/
	$(CARGO) run -q -p kiln-crds -- deploy/crds

.PHONY: check
check: $(TOOLS)/bin/cargo-deny doc ## Format, lints, documentation, licences
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(ALL) --all-targets -- -D warnings
	@# A guard that moves takes along the patch which takes it out.
	git apply --check tests/mutations/*.patch
	$(CARGO) fetch --quiet --locked
	$(TOOLS)/bin/cargo-deny --offline check bans licenses sources

.PHONY: doc
doc: ## The documentation of all crates, in target/…/doc; a broken link is an error
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --quiet $(ALL) --no-deps --document-private-items

.PHONY: unit
unit: ## Unit tests that need neither root nor components; of one crate with P=kiln-shim
	$(CARGO) test $(if $(P),-p $(P) --all-features,$(ALL) --lib --bins)

.PHONY: advisories
advisories: $(TOOLS)/bin/cargo-deny ## Known weaknesses of our crates; fetches the advisory database, which check does not
	$(TOOLS)/bin/cargo-deny --locked check advisories

# Programs with tests in them; the others have theirs in libraries.
TESTED_PROGRAMS := kiln-controller kilnctl kiln-bench kiln-demo

.PHONY: test-unit
test-unit: deps ## Tests that need no running containerd; some need root
	$(CARGO) test $(ALL) --lib $(TESTED_PROGRAMS:%=--bin %) --test architecture --test docs --test service --test real --test router -- --include-ignored
	$(CARGO) test $(ALL) --doc

FUZZED := runsc-wrapper kiln-shim kiln-agent-api kiln-crds kiln-router kiln-controller

.PHONY: fuzz
fuzz: ## What comes from outside with anything in it, FUZZ_SECONDS (60) for each
	BOLERO_RANDOM_TEST_TIME_MS=$$(($(or $(FUZZ_SECONDS),60) * 1000)) \
		$(CARGO) test --release $(FUZZED:%=-p %) --lib --bin kiln-controller -- any_ answered

NODE_SUITES := badinput cri faults install isolation kata lives many noexec warm

.PHONY: test-node
test-node: deps build guest programs ## Suites against real containerd, runsc and runc
	$(CARGO) test $(ALL) $(NODE_SUITES:%=--test %)

SOAK = SOAK_SECONDS=$(or $(SOAK_SECONDS),1800)

.PHONY: isolation-go
isolation-go: deps build guest programs ## The isolation suite on gVisor's own shim; docs/security.md says what fails
	KILN_ISOLATION_HANDLERS=runsc-go $(CARGO) test $(ALL) --test isolation

.PHONY: soak
soak: soak-node ## Pods, then claims, of all kinds at random, with faults, for SOAK_SECONDS (1800) each; SOAK_SEED repeats one
	$(SOAK) $(CARGO) test $(ALL) --test controller -- soak:: --nocapture

.PHONY: soak-node
soak-node: deps build guest programs ## The Pods of it
	$(SOAK) $(CARGO) test $(ALL) --test soak -- --nocapture

.PHONY: test-soak
test-soak: SOAK_SECONDS = 120
test-soak: soak-node ## Two minutes of that

.PHONY: mutate
mutate: deps build guest ## Takes out one guard after the other; a test must notice each
	$(CARGO) test $(ALL) --test isolation --no-run
	CARGO=$(CARGO) tests/mutate.sh

.PHONY: test-controller
test-controller: deps programs ## The controller on a real etcd and kube-apiserver
	$(CARGO) test $(ALL) --test controller

.PHONY: test-cluster
test-cluster: deps build guest programs ## What kubectl does to Pods in gVisor, on a whole cluster
	$(CARGO) test $(ALL) --test cluster

.PHONY: test-deploy
test-deploy: deps programs ## CRDs, policies, chart and classes on a real apiserver; dashboards and alerts
	$(OUT)/debug/kiln-crds --check deploy/crds
	$(CARGO) test $(ALL) --test deploy --test observe

.PHONY: test-kilnctl
test-kilnctl: deps programs ## What kilnctl does to clusters of its own; of KILNCTL_CASES only
	@# A suite takes one filter: each has a run, and so a control plane, of its own.
	for cases in $(or $(KILNCTL_CASES),''); do $(CARGO) test $(ALL) --test kilnctl -- $$cases || exit; done

.PHONY: test-deploy-node
test-deploy-node: deps build programs ## A cluster whose node installs itself, is upgraded, and is left as it was
	$(CARGO) test $(ALL) --test deploy_node

.PHONY: kata-e2e
kata-e2e: deps build guest programs ## A Pod in a virtual machine of Kata's, where the machine has KVM and Kata
	$(CARGO) test $(ALL) -q --test kata-e2e

.PHONY: critest
critest: deps build guest programs ## The CRI conformance suite with our handler, cold and adopted: tests/critest.md
	@# Side by side: most of it is waiting.
	$(OUT)/debug/kiln-critest --handler gvisor >target/critest-cold.log 2>&1 & cold=$$!; \
	$(OUT)/debug/kiln-critest --handler gvisor-warm; warm=$$?; \
	wait $$cold; cold=$$?; cat target/critest-cold.log; exit $$((cold + warm))

.PHONY: test-reuse
test-reuse: deps build guest programs ## A thousand Pods, none of which may meet what another has left
	$(CARGO) test $(ALL) --test reuse

.PHONY: vm
vm: deps build guest programs
	@tests/deps/install.sh vm

.PHONY: test-vm
test-vm: vm ## A node of Debian's packages in a virtual machine, with its containerd 1.7, and again with ours
	KILN_VM_CONTAINERD=1 $(CARGO) test $(ALL) --test vm
	KILN_VM_CONTAINERD=2 $(CARGO) test $(ALL) --test vm

.PHONY: test-vm-short
test-vm-short: vm ## What only such a node can fail, on one boot of it
	$(CARGO) test $(ALL) --test vm -- only_here::

.PHONY: test
test: check test-unit build guest programs ## All of them; of test-kilnctl what is refused, and the manifests
	@# Some beside the others, which wait most of the time.
	$(MAKE) KILNCTL_CASES='refused:: manifests::' test-kilnctl test-reuse >target/test-beside.log 2>&1 & beside=$$!; \
	$(MAKE) test-controller test-deploy test-node test-cluster test-deploy-node test-soak kata-e2e critest; rest=$$?; \
	wait $$beside; beside=$$?; cat target/test-beside.log; exit $$((rest + beside))

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
	KILN_CONTROLLER=$(CURDIR)/$(OUT)/release/kiln-controller $(OUT)/release/kiln-bench-claims

.PHONY: bench-snapshots
bench-snapshots: deps build guest programs ## Suspend and resume with memory, beside cold starts: target/bench/snapshots.json
	$(CARGO) build -q --release -p kiln-controller -p kiln-cluster
	KILN_CONTROLLER=$(CURDIR)/$(OUT)/release/kiln-controller $(OUT)/release/kiln-bench-snapshots

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
	env -u CARGO_BUILD_TARGET -u RUSTFLAGS CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install --debug --quiet --locked --root $(TOOLS) \
		--target-dir $(KILN_CACHE)/build/tools cargo-deny@0.20.2
