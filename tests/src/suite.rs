// SPDX-License-Identifier: Apache-2.0

//! The runner of a test binary whose cases share one fixture.
//!
//! `cargo test` sees the cases by name, with its usual options (`--list`, filters,
//! `--test-threads`). The fixture is made when the first case needs it, and when the last one has
//! ended it is finished: that is where leaks show, and they fail the binary as a case does.

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::{OnceCell, RwLock},
};

use crate::{node::Node, place};

/// Longest that one case may take: a case that hangs must not hang the suite. Longer than what it
/// waits for, which says more when it does not come.
pub const CASE: Duration = Duration::from_secs(1200);

/// Adds functions of modules as cases, named by their paths: `cases!(cases.add, Env: a::b, a::c)`.
#[macro_export]
macro_rules! cases {
    ($cases:ident.$add:ident, $fixture:ty: $($module:ident :: $case:ident),+ $(,)?) => {
        $($cases.$add(
            concat!(stringify!($module), "::", stringify!($case)),
            async move |fixture: &$fixture| $module::$case(fixture).await,
        );)+
    };
}

/// What cases share.
pub trait Fixture: Send + Sync + 'static {
    /// Ends it, and says what is left of the cases.
    fn finish(self) -> impl Future<Output = Result<()>>;

    /// What helps to understand a failure.
    fn log(&self) -> String;
}

impl Fixture for Node {
    async fn finish(self) -> Result<()> {
        let clean = self.check_for_leaks().await;
        self.stop().await.and(clean)
    }

    fn log(&self) -> String {
        format!("--- end of containerd's log\n{}", Node::log(self))
    }
}

type Body<F> = Box<dyn FnOnce(&Runtime, &F) -> Result<()> + Send>;

struct Case<F> {
    name: String,
    alone: bool,
    body: Body<F>,
}

/// The cases of a binary.
pub struct Cases<F> {
    cases: Vec<Case<F>>,
    limit: Duration,
    at_a_time: Option<usize>,
}

impl<F: Fixture> Cases<F> {
    /// No cases.
    #[must_use]
    pub fn new() -> Self {
        Self {
            cases: Vec::new(),
            limit: CASE,
            at_a_time: None,
        }
    }

    /// Runs this many cases at a time, where the command line does not say: more than there are
    /// CPUs pays for those that wait most of the time.
    #[must_use]
    pub fn at_a_time(self, cases: usize) -> Self {
        Self {
            at_a_time: Some(cases),
            ..self
        }
    }

    /// Lets each case that is added from now on take this long instead of [`CASE`].
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Adds a case that may run beside others.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        case: impl AsyncFnOnce(&F) -> Result<()> + Send + 'static,
    ) {
        self.push(name.into(), false, case);
    }

    /// Adds a case that no other case runs beside.
    pub fn add_alone(
        &mut self,
        name: impl Into<String>,
        case: impl AsyncFnOnce(&F) -> Result<()> + Send + 'static,
    ) {
        self.push(name.into(), true, case);
    }

    fn push(
        &mut self,
        name: String,
        alone: bool,
        case: impl AsyncFnOnce(&F) -> Result<()> + Send + 'static,
    ) {
        let limit = self.limit;
        let body = Box::new(move |runtime: &Runtime, fixture: &F| {
            runtime.block_on(async {
                let done = tokio::time::timeout(limit, case(fixture)).await;
                done.with_context(|| format!("not done after {} s", limit.as_secs()))?
            })
        });
        self.cases.push(Case { name, alone, body });
    }

    /// Runs the cases that the command line asks for on the fixture that `start` makes.
    pub fn run<S: Future<Output = Result<F>> + 'static>(
        mut self,
        start: impl Fn() -> S + Send + Sync + 'static,
    ) -> ExitCode {
        let runtime = match tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
        {
            Ok(runtime) => Arc::new(runtime),
            Err(e) => {
                report(&format!("start the event loop: {e}"));
                return ExitCode::FAILURE;
            }
        };
        runtime.spawn(end_by_signal());
        let fixture: Arc<Shared<F>> = Arc::default();
        let start = Arc::new(start);
        // Together, so that others wait for them once.
        self.cases.sort_by_key(|case| case.alone);
        let trials = self.cases.into_iter().map(|case| {
            let (runtime, fixture, start) = (
                Arc::clone(&runtime),
                Arc::clone(&fixture),
                Arc::clone(&start),
            );
            let name = case.name.clone();
            Trial::test(case.name, move || {
                let made = runtime.block_on(
                    fixture
                        .made
                        .get_or_init(|| async { start().await.map_err(|e| format!("{e:#}")) }),
                );
                let made = made.as_ref().map_err(|e| anyhow!("no fixture: {e}"));
                let done = made.and_then(|made| fixture.run(&runtime, made, case.alone, case.body));
                done.map_err(|e| fixture.failed(&name, &format!("{e:#}")))
            })
        });
        let mut arguments = Arguments::from_args();
        arguments.test_threads = arguments.test_threads.or(self.at_a_time);
        let conclusion = libtest_mimic::run(&arguments, trials.collect());
        let Some(Shared { made, failures, .. }) = Arc::into_inner(fixture) else {
            return conclusion.exit_code();
        };
        let Some(Ok(fixture)) = made.into_inner() else {
            return conclusion.exit_code();
        };
        let log = fixture.log();
        if conclusion.has_failed() {
            // What a failed case has left is no news; the fixture takes it away. The log is long,
            // and who has the end of it should read there what went wrong.
            let failures = failures
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner);
            report(&format!("{log}\n--- failed\n{}", failures.join("\n")));
            return conclusion.exit_code();
        }
        match runtime.block_on(fixture.finish()) {
            Ok(()) => conclusion.exit_code(),
            Err(e) => {
                report(&format!("{log}\nafter all cases: {e:#}"));
                ExitCode::FAILURE
            }
        }
    }
}

/// Cleans up before it lets the process end as the signal has it.
async fn end_by_signal() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return report("signals cannot be handled; the next test cleans up after one");
    };
    let number = tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
    };
    place::destroy_all();
    std::process::exit(128 + number.as_raw_value());
}

impl<F: Fixture> Default for Cases<F> {
    fn default() -> Self {
        Self::new()
    }
}

struct Shared<F> {
    made: OnceCell<Result<F, String>>,
    turns: RwLock<()>,
    /// The cases that have failed, with the first line of why.
    failures: Mutex<Vec<String>>,
}

impl<F> Default for Shared<F> {
    fn default() -> Self {
        Self {
            made: OnceCell::new(),
            turns: RwLock::default(),
            failures: Mutex::default(),
        }
    }
}

impl<F> Shared<F> {
    fn failed(&self, case: &str, why: &str) -> Failed {
        let first = why.lines().next().unwrap_or_default();
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(format!("{case}: {first}"));
        Failed::from(why)
    }

    fn run(&self, runtime: &Runtime, fixture: &F, alone: bool, body: Body<F>) -> Result<()> {
        if alone {
            let _turn = runtime.block_on(self.turns.write());
            body(runtime, fixture)
        } else {
            let _turn = runtime.block_on(self.turns.read());
            body(runtime, fixture)
        }
    }
}

#[allow(clippy::print_stderr)] // where a test binary speaks
fn report(words: &str) {
    eprintln!("{words}");
}
