// SPDX-License-Identifier: Apache-2.0

//! What real containerds make of our files, by their own `config dump`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use kiln_tests::tools;
use tempfile::TempDir;
use toml::{Table, Value};

use super::super::{
    Error, Run, SHIM,
    containerd::Containerd,
    files::Changes,
    wiring::{CRI, RUNTIME_TYPE},
};
use crate::config::Config;

/// Programs of the lines of releases that merge files in ways of their own.
const OLD: &str = "containerd-1.7";
const BEFORE_2_2: &str = "containerd-2.1";
const NEWEST: &str = "containerd";
const ALL: [&str; 3] = [OLD, BEFORE_2_2, NEWEST];

/// Files for users.
const DROP_IN: &str = include_str!("../../../deploy/containerd.toml");
const TABLE: &str = include_str!("../../../deploy/containerd-1.7.toml");
const KATA: &str = include_str!("../../../deploy/kata/containerd.toml");

/// Own files of nodes, each with settings of CRI and of other plugins.
const VERSION_1: &str = r#"
oom_score = -999
[plugins.cri]
sandbox_image = "registry.example/pause:3.10"
[plugins.cri.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.cri.containerd.runtimes.runc.options]
SystemdCgroup = true
"#;
const VERSION_2: &str = r#"version = 2
# IMPORTS
oom_score = -999
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.example/pause:3.10"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/theirs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.theirs]
runtime_type = "io.containerd.theirs.v1"
"#;
const VERSION_3: &str = r#"version = 3
# IMPORTS
oom_score = -999
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "registry.example/pause:3.10"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dir = "/opt/theirs"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = true
"#;

/// A node with one of the containerds.
struct Node {
    dir: TempDir,
    program: PathBuf,
}

impl Node {
    /// With this as containerd's own file, if it has one.
    fn new(program: &str, own: Option<&str>) -> Self {
        let this = Self {
            dir: tempfile::tempdir().unwrap(),
            program: tools::program(program).unwrap(),
        };
        if let Some(text) = own {
            fs::write(this.own(), text).unwrap();
        }
        this
    }

    /// With an own file that imports a directory in which others have these files.
    fn importing(program: &str, own: &str, theirs: &[(&str, &str)]) -> Self {
        let this = Self::new(program, None);
        let dir = this.at("conf.d");
        fs::create_dir(&dir).unwrap();
        let imports = format!("imports = [\"{}/*.toml\"]", dir.display());
        let text = match own.contains("# IMPORTS") {
            true => own.replace("# IMPORTS", &imports),
            false => format!("{imports}\n{own}"),
        };
        fs::write(this.own(), text).unwrap();
        for (name, text) in theirs {
            fs::write(dir.join(name), text).unwrap();
        }
        this
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn own(&self) -> PathBuf {
        self.at("config.toml")
    }

    fn append(&self, text: &str) {
        let own = fs::read_to_string(self.own()).unwrap();
        fs::write(self.own(), own + text).unwrap();
    }

    async fn containerd(&self) -> Containerd {
        Containerd::of(self.program.clone(), self.own()).await
    }

    async fn dump(&self) -> Result<Settings, Error> {
        // 1.7 starts without a file, but does not dump without one.
        let own = Some(self.own()).filter(|own| own.exists());
        let own = own.unwrap_or_else(|| "/dev/null".into());
        let dump = self.containerd().await.dump(&own).await?;
        Ok(Settings::of(dump))
    }

    /// Has containerd's files name the handler of the installation in `opt`, as an installation
    /// does. Returns whether files have changed.
    async fn wire(&self) -> Result<bool, Error> {
        self.wire_another("opt", "gvisor", "").await
    }

    /// Has them name that of the installation in `dir`, which has `more` in its configuration.
    async fn wire_another(&self, dir: &str, handler: &str, more: &str) -> Result<bool, Error> {
        let dir = self.at(dir);
        let text = format!(
            "runtime_config = '/etc/{handler}.toml'\n\
             [install]\ndir = '{}'\nhandler = '{handler}'\n{more}\n",
            dir.display()
        );
        let config: Config = toml::from_str(&text).unwrap();
        let install = config.install.as_ref().unwrap();
        let containerd = self.containerd().await;
        let mut run = Run {
            config: &config,
            install,
            containerd: &containerd,
            changes: Changes::begin(&dir).unwrap(),
            changed: false,
            restarts: None,
        };
        match run.wire(&install.program(SHIM)).await {
            Ok(()) => {
                let changed = run.changed;
                run.changes.commit().unwrap();
                Ok(changed)
            }
            Err(e) => {
                run.changes.roll_back().unwrap();
                Err(e)
            }
        }
    }

    /// Every file with what is in it.
    fn files(&self) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        let mut dirs = vec![self.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                match entry.path() {
                    path if path.is_dir() => dirs.push(path),
                    path => drop(found.insert(path.clone(), fs::read_to_string(path).unwrap())),
                }
            }
        }
        found
    }

    /// Wires the handler, and expects it and nothing else to be new.
    async fn expect_wired(&self, case: &str) {
        let before = self.dump().await.unwrap();
        let wired = self.wire().await;
        assert!(wired.unwrap_or_else(|e| panic!("{case}: {e}")), "{case}");
        let after = self.dump().await.unwrap();
        after.expect_handler("gvisor", RUNTIME_TYPE, "/etc/gvisor.toml", case);
        assert_eq!(before.without("gvisor"), after.without("gvisor"), "{case}");
        assert!(!self.wire().await.unwrap(), "{case}: again");
    }

    /// Expects that the handler is not wired, for a reason that has these words, and that all
    /// stays as it was.
    async fn expect_refused(&self, words: &[&str], case: &str) {
        let before = self.files();
        let said = self.wire().await.unwrap_err().to_string();
        for word in words {
            assert!(said.contains(word), "{case}: no {word:?} in {said}");
        }
        assert!(!said.contains(".kiln-"), "{case}: {said}");
        assert_eq!(self.files(), before, "{case}");
    }
}

/// What containerd goes by: each value under the keys above it.
#[derive(Debug, Clone, PartialEq)]
struct Settings(BTreeMap<String, Value>);

impl Settings {
    fn of(dump: Table) -> Self {
        fn add(to: &mut BTreeMap<String, Value>, above: &str, table: Table) {
            for (key, value) in table {
                let key = format!("{above}/{key}");
                match value {
                    Value::Table(table) => add(to, &key, table),
                    value => drop(to.insert(key, value)),
                }
            }
        }
        let mut all = BTreeMap::new();
        add(&mut all, "", dump);
        Self(all)
    }

    /// All but that of a handler, and the names of the files.
    fn without(&self, handler: &str) -> Self {
        let of_handler = CRI.map(|cri| format!("/plugins/{cri}/containerd/runtimes/{handler}/"));
        let mut rest = self.clone();
        rest.0
            .retain(|key, _| key != "/imports" && !of_handler.iter().any(|h| key.starts_with(h)));
        rest
    }

    /// What a handler says under `key`.
    fn of_handler(&self, handler: &str, key: &str) -> Option<&str> {
        let at = |cri| format!("/plugins/{cri}/containerd/runtimes/{handler}/{key}");
        let found = CRI.iter().find_map(|cri| self.0.get(&at(cri)));
        found.and_then(Value::as_str)
    }

    #[track_caller]
    fn expect_handler(&self, name: &str, runtime_type: &str, config: &str, case: &str) {
        let of = |key| self.of_handler(name, key);
        assert_eq!(of("runtime_type"), Some(runtime_type), "{case}");
        assert_eq!(of("options/ConfigPath"), Some(config), "{case}");
    }

    /// Whether it has what the own files above set of handler runc.
    fn has_systemd_cgroup(&self) -> bool {
        let end = "/runtimes/runc/options/SystemdCgroup";
        let mut found = self.0.iter().filter(|(key, _)| key.ends_with(end));
        found.any(|(_, value)| value.as_bool() == Some(true))
    }
}

#[tokio::test]
async fn the_handler_is_added_and_nothing_else_changes() {
    for program in ALL {
        Node::new(program, None).expect_wired(program).await;
        let readable = match program {
            OLD => &[VERSION_2][..],
            _ => &[VERSION_2, VERSION_3],
        };
        for own in readable {
            let case = format!("{program} with {own}");
            let node = Node::new(program, Some(own));
            assert!(node.dump().await.unwrap().has_systemd_cgroup(), "{case}");
            node.expect_wired(&case).await;
            let version = &own[..own.find('\n').unwrap()];
            let theirs = format!(
                "{version}\n[plugins.'io.containerd.gc.v1.scheduler']\nmutation_threshold = 7\n"
            );
            // Read before ours and after.
            let files = [("10-theirs.toml", &*theirs), ("zz-theirs.toml", version)];
            let node = Node::importing(program, own, &files);
            assert!(node.dump().await.unwrap().has_systemd_cgroup(), "{case}");
            node.expect_wired(&format!("{case}, imports")).await;
            let empty = Node::importing(program, own, &[]);
            empty.expect_wired(&format!("{case}, no imports")).await;
        }
    }
}

/// Files that are imported from where the own file is, by one name, by a part of a name.
#[tokio::test]
async fn imports_of_any_form_are_kept() {
    for program in ALL {
        for own in [VERSION_2, VERSION_3] {
            if program == OLD && own == VERSION_3 {
                continue;
            }
            for imports in [
                "'conf.d/*.toml'",
                "'conf.d/10-*.toml'",
                "'conf.d/10-theirs.toml', 'other.d/*'",
            ] {
                let case = format!("{program}, {imports}");
                let list = format!("imports = [{imports}]");
                let node = Node::new(program, Some(&own.replace("# IMPORTS", &list)));
                let version = &own[..own.find('\n').unwrap()];
                for dir in ["conf.d", "other.d"] {
                    fs::create_dir(node.at(dir)).unwrap();
                    let theirs = node.at(dir).join("10-theirs.toml");
                    fs::write(theirs, format!("{version}\noom_score = -7\n")).unwrap();
                }
                let oom_score = |settings: Settings| settings.0["/oom_score"].as_integer();
                assert_eq!(oom_score(node.dump().await.unwrap()), Some(-7), "{case}");
                node.expect_wired(&case).await;
            }
        }
    }
}

#[tokio::test]
async fn an_own_file_that_is_a_link_stays_one() {
    for program in ALL {
        let node = Node::new(program, Some(VERSION_2));
        fs::create_dir(node.at("theirs")).unwrap();
        fs::rename(node.own(), node.at("theirs/own.toml")).unwrap();
        std::os::unix::fs::symlink("theirs/own.toml", node.own()).unwrap();
        node.expect_wired(program).await;
        assert!(node.own().is_symlink(), "{program}");
    }
}

/// As k3s and rke2 write it at each of their starts, from templates of two generations.
#[tokio::test]
async fn a_generated_file_is_not_written_to() {
    let head = "# File generated by k3s. DO NOT EDIT. Use config-v3.toml.tmpl instead.\n";
    for program in [BEFORE_2_2, NEWEST] {
        let own = format!("{head}{VERSION_3}");
        let node = Node::importing(program, &own, &[]);
        let before = fs::read_to_string(node.own()).unwrap();
        node.expect_wired(program).await;
        assert_eq!(fs::read_to_string(node.own()).unwrap(), before);
        assert!(node.at("conf.d/kiln.toml").exists());
    }
    for program in ALL {
        let node = Node::new(program, Some(&format!("{head}{VERSION_2}")));
        let words = ["is generated", "have what generates it write `imports`"];
        node.expect_refused(&words, program).await;
    }
}

#[tokio::test]
async fn an_own_file_of_version_1_bears_a_drop_in_from_containerd_2_on() {
    let explicit = format!("version = 1\n{VERSION_1}");
    for own in [VERSION_1, &explicit] {
        for program in [BEFORE_2_2, NEWEST] {
            Node::new(program, Some(own)).expect_wired(program).await;
            let node = Node::importing(program, own, &[]);
            node.expect_wired(program).await;
        }
        let words = [
            "config.toml is in version 1",
            "invalid plugin key",
            "in version 2, as `containerd config dump` prints it",
        ];
        let node = Node::new(OLD, Some(own));
        assert!(node.dump().await.unwrap().has_systemd_cgroup());
        node.expect_refused(&words, own).await;
        let imports = Node::importing(OLD, own, &[]);
        imports.expect_refused(&words, own).await;

        // As the message says.
        let containerd = node.containerd().await;
        let args = ["--config".as_ref(), containerd.config.as_os_str()];
        let dump = [&args[..], &["config".as_ref(), "dump".as_ref()]].concat();
        let text = containerd.ask(&containerd.program, &dump, super::super::ANSWER);
        fs::write(node.own(), text.await.unwrap()).unwrap();
        assert!(node.dump().await.unwrap().has_systemd_cgroup());
        node.expect_wired("after config dump").await;
    }
    // One that names no plugin is in no version.
    let node = Node::new(OLD, Some("oom_score = -999\n"));
    node.expect_wired("no plugins").await;
}

#[tokio::test]
async fn files_of_two_versions_are_refused_where_containerd_mixes_them_up() {
    let theirs =
        "version = 3\n[plugins.'io.containerd.cri.v1.runtime']\nmax_container_log_line_size = 7\n";
    let files = [("10-theirs.toml", theirs)];
    let node = Node::importing(NEWEST, VERSION_2, &files);
    node.expect_wired(NEWEST).await;
    let node = Node::importing(BEFORE_2_2, VERSION_2, &files);
    node.expect_refused(&["would change", "in one version"], BEFORE_2_2)
        .await;
}

#[tokio::test]
async fn after_an_upgrade_of_containerd_our_file_has_the_handler_alone() {
    let mut node = Node::new(OLD, Some(VERSION_2));
    node.wire().await.unwrap();
    for program in [BEFORE_2_2, NEWEST] {
        let without = Node::new(program, Some(VERSION_2)).dump().await.unwrap();
        node.program = tools::program(program).unwrap();
        let before = node.dump().await.unwrap();
        before.expect_handler("gvisor", RUNTIME_TYPE, "/etc/gvisor.toml", program);
        // Until then, our file has defaults of the old one in it.
        node.wire().await.unwrap();
        let after = node.dump().await.unwrap();
        after.expect_handler("gvisor", RUNTIME_TYPE, "/etc/gvisor.toml", program);
        assert_eq!(after.without("gvisor"), without.without("gvisor"));
    }
}

#[tokio::test]
async fn a_file_that_containerd_cannot_read_is_named() {
    for program in ALL {
        let node = Node::new(program, Some("version = 2\n[plugins.'x\n"));
        node.expect_refused(&["config.toml"], program).await;
        let node = Node::importing(program, VERSION_2, &[("theirs.toml", "[\n")]);
        node.expect_refused(&["config dump", "theirs.toml"], program)
            .await;
    }
    let node = Node::new(OLD, Some(VERSION_3));
    node.expect_refused(&["config.toml", "unsupported config version"], OLD)
        .await;
}

#[tokio::test]
async fn the_handler_of_another_installation_stays() {
    for (program, own) in [(OLD, VERSION_2), (NEWEST, VERSION_3)] {
        for node in [
            Node::new(program, Some(own)),
            Node::importing(program, own, &[]),
        ] {
            assert!(node.wire().await.unwrap());
            let before = node.files();
            let first = node.at("opt/bin").join(SHIM).display().to_string();
            let elsewhere = node.at("kiln-2.toml").display().to_string();
            let elsewhere = format!("[install.containerd]\ndrop_in = '{elsewhere}'\n");
            for (handler, more) in [("gvisor", ""), ("second", ""), ("second", &*elsewhere)] {
                let case = format!("{program}, {handler}, {more}");
                let said = node.wire_another("opt2", handler, more).await;
                let said = said.unwrap_err().to_string();
                for word in [
                    "another installation of Kiln: handler gvisor by",
                    &first,
                    "kilnctl node disable",
                ] {
                    assert!(said.contains(word), "{case}: no {word:?} in {said}");
                }
                assert_eq!(node.files(), before, "{case}");
            }
            assert!(!node.wire().await.unwrap());
        }
    }
}

/// How docs/install-containerd.md has a user add a handler.
enum ByHand {
    /// To the own file.
    Append,
    /// In a directory that the own file imports.
    DropIn,
}

impl ByHand {
    /// A node with this own file, before and after `text` was added.
    async fn add(
        &self,
        program: &str,
        own: &str,
        text: &str,
    ) -> (Settings, Result<Settings, Error>) {
        let node = Node::importing(program, own, &[]);
        let before = node.dump().await.unwrap();
        match self {
            Self::Append => node.append(text),
            Self::DropIn => fs::write(node.at("conf.d/kiln.toml"), text).unwrap(),
        }
        (before, node.dump().await)
    }
}

#[tokio::test]
async fn files_for_users_add_the_handler_and_nothing_else() {
    for (program, own, by_hand, text) in [
        (OLD, VERSION_2, ByHand::Append, TABLE),
        (BEFORE_2_2, VERSION_2, ByHand::Append, TABLE),
        (NEWEST, VERSION_2, ByHand::Append, TABLE),
        (BEFORE_2_2, VERSION_3, ByHand::DropIn, DROP_IN),
        (NEWEST, VERSION_3, ByHand::DropIn, DROP_IN),
        (BEFORE_2_2, VERSION_1, ByHand::DropIn, DROP_IN),
        (NEWEST, VERSION_1, ByHand::DropIn, DROP_IN),
    ] {
        let (before, after) = by_hand.add(program, own, text).await;
        let (after, case) = (after.unwrap(), format!("{program} with {own}"));
        after.expect_handler("gvisor", RUNTIME_TYPE, "/etc/kiln/runsc.toml", &case);
        assert_eq!(
            after.of_handler("gvisor", "options/TypeUrl"),
            Some("io.containerd.runsc.v1.options")
        );
        assert_eq!(before.without("gvisor"), after.without("gvisor"), "{case}");
    }
    // As docs/kata.md has it for an own file of version 2.
    let table = KATA.replace("version = 3\n", "").replace(CRI[0], CRI[1]);
    for (program, own, by_hand, text) in [
        (OLD, VERSION_2, ByHand::Append, &*table),
        (BEFORE_2_2, VERSION_2, ByHand::Append, &*table),
        (BEFORE_2_2, VERSION_3, ByHand::DropIn, KATA),
        (NEWEST, VERSION_3, ByHand::DropIn, KATA),
    ] {
        let (before, after) = by_hand.add(program, own, text).await;
        let after = after.unwrap();
        let config = "/opt/kata/share/defaults/kata-containers/configuration.toml";
        after.expect_handler("kata", "io.containerd.kata.v2", config, program);
        assert_eq!(before.without("kata"), after.without("kata"), "{program}");
    }
}

/// Why docs/install-containerd.md has two ways.
#[tokio::test]
async fn files_for_users_do_harm_in_another_place() {
    let (_, after) = ByHand::DropIn.add(OLD, VERSION_2, DROP_IN).await;
    let said = after.unwrap_err().to_string();
    assert!(said.contains("unsupported config version `3`"), "{said}");
    for (program, text) in [(OLD, TABLE), (BEFORE_2_2, DROP_IN)] {
        let (before, after) = ByHand::DropIn.add(program, VERSION_2, text).await;
        assert!(before.has_systemd_cgroup());
        assert!(!after.unwrap().has_systemd_cgroup(), "{program}");
    }
}
