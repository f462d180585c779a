// SPDX-License-Identifier: Apache-2.0

//! `kilnctl node enable` and `disable` on a containerd that does not know the handler: Pods run
//! by it, live through upgrades and keep it from being taken away, and whatever goes wrong, the
//! node is as it was.

mod place;
mod upkeep;

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::ExitCode};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Node, NodeOpts},
    process::{Cmd, Daemon},
    suite::Cases,
    tools, wait,
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};

use place::{DEADLINE, HANDLER, Installation};

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    macro_rules! add {
        ($($case:ident),+ $(,)?) => {
            $(cases.add_alone(stringify!($case), async |node: &Node| {
                let place = Installation::new(node, stringify!($case))?;
                $case(&place).await
            });)+
        };
    }
    add!(
        a_node_gets_the_handler_and_loses_it,
        pods_live_through_an_upgrade_and_keep_their_handler,
        the_nodes_own_runsc_is_adopted,
        a_users_edits_survive,
        a_runtime_that_runs_nothing_is_put_back,
        an_upgrade_that_fails_leaves_the_last_one,
        a_node_without_runsc_is_told_so,
        what_others_say_of_the_handler_is_seen_before_a_restart,
        a_broken_configuration_is_left_alone,
        a_containerd_that_cannot_be_restarted_is_named,
        a_containerd_that_is_too_old_is_named,
        two_installations_are_not_under_way_at_once,
        a_second_installation_leaves_the_first_alone,
        a_directory_that_was_wiped_can_be_made_anew,
    );
    macro_rules! add_upkeep {
        ($($case:ident),+ $(,)?) => {
            $(cases.add_alone(concat!("upkeep::", stringify!($case)), async |node: &Node| {
                let place = Installation::new(node, stringify!($case))?;
                let done = upkeep::$case(&place).await;
                if done.is_err() {
                    // It would be in the way of the next; that the case failed is what is told.
                    place.does("disable").await.ok();
                }
                done
            });)+
        };
    }
    add_upkeep!(
        a_rewritten_configuration_is_wired_again_below_a_pod,
        programs_that_were_removed_are_put_back,
        who_takes_it_away_again_is_not_followed_at_once,
        without_repair_it_is_only_said,
        a_node_set_up_by_hand_is_only_reported,
        a_node_comes_back_without_what_was_in_run,
    );
    cases.run(|| Node::start(NodeOpts::default()))
}

async fn a_node_gets_the_handler_and_loses_it(place: &Installation<'_>) -> Result<()> {
    let before = place.listing()?;
    let said = place.does("disable").await?;
    ensure!(said.contains("nothing was installed"), "{said}");
    let said = place.does("enable").await?;
    ensure!(
        said.contains("started anew") && said.contains("sandboxes run"),
        "{said}"
    );
    place.expect_handler().await?;
    let installed = place.listing()?;
    let pid = place.node.containerd_pid().await;
    let said = place.does("enable").await?;
    ensure!(said.contains("nothing had to be changed"), "{said}");
    place.expect_as(&installed)?;
    ensure!(place.node.containerd_pid().await == pid, "started anew");
    place.does("disable").await?;
    place.expect_no_handler().await?;
    place.expect_as(&before)
}

/// Another build of a program: what follows a program's last byte changes nothing in it.
fn rebuild(place: &Installation<'_>, name: &str) -> Result<()> {
    let path = place.from(name);
    let mut bytes = fs::read(&path)?;
    bytes.extend_from_slice(b"another build");
    fs::remove_file(&path)?;
    fs::write(&path, bytes)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

async fn pods_live_through_an_upgrade_and_keep_their_handler(
    place: &Installation<'_>,
) -> Result<()> {
    let before = place.listing()?;
    place.does("enable").await?;
    let pod = place.node.pod(HANDLER).run().await?;
    let container = pod.idle().start().await?;
    let bin = place.dir.join("opt/bin");
    let runtimes = || -> Result<usize> {
        let names = fs::read_dir(&bin)?.flatten().map(|e| e.file_name());
        Ok(names
            .filter(|n| n.to_string_lossy().starts_with("runsc"))
            .count())
    };
    ensure!(runtimes()? == 1, "not one runsc");

    for program in ["containerd-shim-kiln-v2", "runsc"] {
        rebuild(place, program)?;
    }
    let pid = place.node.containerd_pid().await;
    let said = place.does("enable").await?;
    ensure!(said.contains("without starting containerd anew"), "{said}");
    ensure!(place.node.containerd_pid().await == pid, "started anew");
    let said = container.sh("echo still here").await?;
    ensure!(said.trim() == "still here", "exec: {said:?}");
    ensure!(runtimes()? == 2, "the Pod's runsc is gone");
    place.expect_handler().await?;

    place
        .fails(
            "disable",
            &["nothing was changed", "1 Pods run", "End them"],
        )
        .await?;
    let said = container.sh("echo still here").await?;
    ensure!(said.trim() == "still here", "exec: {said:?}");
    container.stop(0).await?;
    pod.remove().await?;
    let said = place.does("disable").await?;
    ensure!(said.contains("nothing of it is left"), "{said}");
    place.expect_no_handler().await?;
    // As before, but for the other build that it was given.
    let now = place.listing()?;
    ensure!(now.keys().eq(before.keys()), "{:?}", now.keys());
    let config = place.containerd_config();
    ensure!(now.get(&config) == before.get(&config), "containerd's file");
    Ok(())
}

async fn the_nodes_own_runsc_is_adopted(place: &Installation<'_>) -> Result<()> {
    fs::remove_file(place.from("runsc"))?;
    let own = format!(
        "# The node's.\nbinary_name = \"{}\"\nroot = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n[kiln]\nagent = \"\"\n",
        tools::runsc()?.display(),
        place.node.dir().join("ri").display(),
    );
    fs::create_dir(place.dir.join("etc"))?;
    fs::write(place.dir.join("etc/runsc.toml"), &own)?;
    let before = place.listing()?;
    place.does("enable").await?;
    ensure!(
        fs::read_to_string(place.dir.join("etc/runsc.toml"))? == own,
        "it was changed"
    );
    place.expect_handler().await?;
    place.does("disable").await?;
    place.expect_as(&before)?;
    // And without a configuration, by its path.
    fs::remove_dir_all(place.dir.join("etc"))?;
    let before = place.listing()?;
    let runsc = tools::runsc()?;
    place
        .does(&format!("enable --runsc {}", runsc.display()))
        .await?;
    place.expect_handler().await?;
    place.does("disable").await?;
    place.expect_as(&before)
}

async fn a_users_edits_survive(place: &Installation<'_>) -> Result<()> {
    let config = place.containerd_config();
    let original = fs::read_to_string(&config)?;
    place.does("enable").await?;
    let runtime = place.dir.join("etc/runsc.toml");
    let edited = fs::read_to_string(&runtime)? + "# Mine.\n";
    fs::write(&runtime, &edited)?;
    let wired = fs::read_to_string(&config)?;
    fs::write(&config, format!("# Mine.\n{wired}"))?;
    place.does("enable").await?;
    ensure!(
        fs::read_to_string(&runtime)? == edited,
        "it was overwritten"
    );
    place.expect_handler().await?;
    place.does("disable").await?;
    let left = fs::read_to_string(&config)?;
    ensure!(
        left.starts_with("# Mine.\n") && !left.contains("kiln.toml"),
        "{left}"
    );
    place.expect_no_handler().await?;
    fs::write(&config, original)?;
    Ok(())
}

/// Has runsc know its version, and nothing else.
fn break_runsc(place: &Installation<'_>) -> Result<()> {
    let script = "#!/bin/sh\n[ \"$1\" = --version ] && echo runsc version release-20990101.0 && exit\n\
                  echo this one is broken >&2\nexit 1\n";
    let path = place.script("from/runsc", script)?;
    ensure!(path == place.from("runsc"), "{path:?}");
    Ok(())
}

async fn a_runtime_that_runs_nothing_is_put_back(place: &Installation<'_>) -> Result<()> {
    break_runsc(place)?;
    let before = place.listing()?;
    place
        .fails(
            "enable",
            &["a sandbox for trial does not run", "put back as it was"],
        )
        .await?;
    place.expect_as(&before)?;
    place.expect_no_handler().await
}

async fn an_upgrade_that_fails_leaves_the_last_one(place: &Installation<'_>) -> Result<()> {
    place.does("enable").await?;
    let installed = place.listing()?;
    break_runsc(place)?;
    let pid = place.node.containerd_pid().await;
    place
        .fails("enable", &["a sandbox for trial does not run"])
        .await?;
    let mut wanted = installed;
    wanted.insert(place.from("runsc"), fs::read(place.from("runsc"))?);
    place.expect_as(&wanted)?;
    ensure!(place.node.containerd_pid().await == pid, "started anew");
    place.expect_handler().await?;
    place.does("disable").await.map(drop)
}

async fn a_node_without_runsc_is_told_so(place: &Installation<'_>) -> Result<()> {
    fs::remove_file(place.from("runsc"))?;
    let before = place.listing()?;
    place
        .fails(
            "enable",
            &["there is no runsc", "`runsc` in [install]", "put back"],
        )
        .await?;
    place.expect_as(&before)?;
    place.configure("runsc = \"/nowhere/runsc\"")?;
    let before = place.listing()?;
    place
        .fails("enable", &["/nowhere/runsc", "install runsc"])
        .await?;
    place.expect_as(&before)
}

/// Changes containerd's own file for a case.
struct Edited<'a>(&'a Installation<'a>, String);

impl<'a> Edited<'a> {
    fn new(place: &'a Installation<'a>, edit: impl Fn(&str) -> String) -> Result<Self> {
        let text = fs::read_to_string(place.containerd_config())?;
        fs::write(place.containerd_config(), edit(&text))?;
        Ok(Self(place, text))
    }
}

impl Drop for Edited<'_> {
    fn drop(&mut self) {
        // Where it fails, the next case does.
        fs::write(self.0.containerd_config(), &self.1).ok();
    }
}

async fn what_others_say_of_the_handler_is_seen_before_a_restart(
    place: &Installation<'_>,
) -> Result<()> {
    let other = place.dir.join("zz.toml");
    fs::write(
        &other,
        format!(
            "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{HANDLER}]\n\
             runtime_path = '/bin/theirs'\n"
        ),
    )?;
    let dir = place.dir.display();
    let _edited = Edited::new(place, |text| {
        text.replacen(
            "version = 3\n",
            &format!("version = 3\nimports = [\"{dir}/*.toml\"]\n"),
            1,
        )
    })?;
    // It would be read as well.
    fs::rename(place.dir.join("agent.toml"), place.dir.join("agent"))?;
    let before = place.listing()?;
    let pid = place.node.containerd_pid().await;
    let config = place.dir.join("agent");
    let output = Cmd::new(&tools::ours("kilnctl")?)
        .args(["node", "enable", "--config"])
        .args([&config, Path::new("--from"), &place.dir.join("from")])
        .deadline(DEADLINE)
        .output()
        .await?;
    let said = output.errors();
    ensure!(said.contains("another file changes"), "{said}");
    ensure!(place.node.containerd_pid().await == pid, "started anew");
    place.expect_as(&before)
}

async fn a_broken_configuration_is_left_alone(place: &Installation<'_>) -> Result<()> {
    let broken = Edited::new(place, |text| format!("{text}\n[\n"))?;
    let before = place.listing()?;
    place
        .fails("enable", &["containerd.toml", "put back"])
        .await?;
    place.expect_as(&before)?;
    drop(broken);
    // Another file that containerd reads as well.
    let dir = place.dir.join("conf.d");
    fs::create_dir(&dir)?;
    fs::write(dir.join("theirs.toml"), "[\n")?;
    let broken = Edited::new(place, |text| {
        let imports = format!("imports = [\"{}/*.toml\"]", dir.display());
        text.replacen("version = 3\n", &format!("version = 3\n{imports}\n"), 1)
    })?;
    let before = place.listing()?;
    place
        .fails("enable", &["theirs.toml", "config dump", "put back"])
        .await?;
    place.expect_as(&before)?;
    drop(broken);
    // One that containerd reads, but that says of an import what is no file's name.
    let _edited = Edited::new(place, |text| {
        text.replacen("version = 3\n", "version = 3\nimports = \"x\"\n", 1)
    })?;
    let before = place.listing()?;
    place.fails("enable", &["put back"]).await?;
    place.expect_as(&before)
}

async fn a_containerd_that_cannot_be_restarted_is_named(place: &Installation<'_>) -> Result<()> {
    place.script("restart", "#!/bin/sh\necho no such unit >&2\nexit 5\n")?;
    let before = place.listing()?;
    place.fails("enable", &["restart", "no such unit"]).await?;
    place.expect_as(&before)?;
    let text = fs::read_to_string(place.dir.join("agent.toml"))?;
    let nobody = text.replace("c.sock", "nobody.sock");
    fs::write(place.dir.join("agent.toml"), nobody)?;
    let before = place.listing()?;
    place
        .fails("enable", &["no containerd listens at", "nobody.sock"])
        .await
        .context("nobody")?;
    place.expect_as(&before)
}

async fn a_containerd_that_is_too_old_is_named(place: &Installation<'_>) -> Result<()> {
    let dir = place.dir.join("old");
    fs::create_dir(&dir)?;
    let program = dir.join("containerd");
    fs::copy(tools::ours("kiln-containerd-standin")?, &program)?;
    fs::write(
        dir.join("version"),
        "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1\n",
    )?;
    let socket = dir.join("containerd.sock");
    let words = [socket.as_os_str()];
    let (cgroup, log) = (place.node.cgroup(), dir.join("log"));
    let mut old = Daemon::start(&program, &words, &[], None, cgroup, &log)?;
    wait::until("the old containerd", wait::SOON, async || {
        socket.exists().then_some(())
    })
    .await?;
    let text = fs::read_to_string(place.dir.join("agent.toml"))?;
    let other = text.replace(
        &place.node.socket().display().to_string(),
        &socket.display().to_string(),
    );
    fs::write(place.dir.join("agent.toml"), other)?;
    let before = place.listing()?;
    place
        .fails("enable", &["1.6.20", "use containerd 1.7 or newer"])
        .await?;
    place.expect_as(&before)?;
    old.stop(Signal::SIGKILL, wait::SOON).await
}

async fn two_installations_are_not_under_way_at_once(place: &Installation<'_>) -> Result<()> {
    let before = place.listing()?;
    let dir = fs::File::open(place.node.dir())?;
    let other = Flock::lock(dir, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    place
        .fails("enable", &["another installation", "try again"])
        .await?;
    place.expect_as(&before)?;
    drop(other);
    place.does("enable").await?;
    place.does("disable").await?;
    place.expect_as(&before)
}

async fn a_second_installation_leaves_the_first_alone(place: &Installation<'_>) -> Result<()> {
    let other = Installation::new(place.node, "second")?;
    let text = fs::read_to_string(other.dir.join("agent.toml"))?;
    let named = format!("handler = \"{HANDLER}\"");
    let text = text.replace(&named, "handler = \"second\"");
    fs::write(other.dir.join("agent.toml"), text)?;
    let before = place.listing()?;
    place.does("enable").await?;
    let first = other.listing()?;
    let words = ["another installation of Kiln", HANDLER, "put back"];
    other.fails("enable", &words).await?;
    other.expect_as(&first)?;
    place.expect_handler().await?;
    place.does("disable").await?;
    other.does("enable").await?;
    other.does("disable").await?;
    place.expect_as(&before)?;
    fs::remove_dir_all(&other.dir)?;
    Ok(())
}

/// What the record and the programs were in, and the runtime's configuration that names them.
async fn a_directory_that_was_wiped_can_be_made_anew(place: &Installation<'_>) -> Result<()> {
    let before = place.listing()?;
    place.does("enable").await?;
    fs::remove_dir_all(place.dir.join("opt"))?;
    place.does("enable").await?;
    place.expect_handler().await?;
    place.does("disable").await?;
    place.expect_no_handler().await?;
    // A directory that is empty may be anybody's.
    fs::remove_dir(place.node.dir().join("conf.d"))?;
    place.expect_as(&before)
}
