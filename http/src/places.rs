// SPDX-License-Identifier: Apache-2.0

//! Places of a listener: how many connections there are, of which clients, and which of them wait
//! for a request.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout_at},
};
use tokio_util::sync::CancellationToken;

/// How long a connection may wait for a request while places are short.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// How long there may be no place until clients are told so, instead of having to wait.
const FULL: Duration = Duration::from_secs(5);

/// Numbers of a listener, to be registered as metrics.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Connections that have a place.
    pub connections: Gauge,
    /// Connections that got none, by reason: `client` (its address has as many as it may have),
    /// `full`.
    pub refused: Family<Reason, Counter>,
}

/// Label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    reason: &'static str,
}

/// Why a connection gets no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Its client has as many as it may have.
    Client,
    /// There has been none for some time.
    Full,
}

/// All places of a listener.
pub(crate) struct Places {
    room: Arc<Semaphore>,
    per_client: usize,
    counts: Counts,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    clients: HashMap<IpAddr, usize>,
    /// Connections that wait for a request. The number grows, so the first has waited longest.
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
    /// Since when nobody got a place.
    full_since: Option<Instant>,
}

struct Waiting {
    since: Instant,
    give_way: CancellationToken,
}

impl Places {
    pub(crate) fn new(connections: usize, per_client: usize, counts: Counts) -> Arc<Self> {
        Arc::new(Self {
            room: Arc::new(Semaphore::new(connections)),
            per_client,
            counts,
            state: Mutex::default(),
        })
    }

    /// A place for a connection of `client`. Waits while there is none, but not for long. To be
    /// called by one task only.
    pub(crate) async fn take(self: &Arc<Self>, client: IpAddr) -> Result<Arc<Place>, Refused> {
        self.admit(client)?;
        match self.room().await {
            Some(permit) => self.give(client, permit),
            None => Err(self.refuse(Refused::Full)),
        }
    }

    /// A place for `client`, if there is one at once.
    fn take_now(self: &Arc<Self>, client: IpAddr) -> Result<Arc<Place>, Refused> {
        self.admit(client)?;
        match Arc::clone(&self.room).try_acquire_owned() {
            Ok(permit) => self.give(client, permit),
            Err(_) => Err(self.refuse(Refused::Full)),
        }
    }

    fn admit(&self, client: IpAddr) -> Result<(), Refused> {
        let state = self.lock();
        let held = state.clients.get(&client).copied().unwrap_or_default();
        drop(state);
        match held < self.per_client {
            true => Ok(()),
            false => Err(self.refuse(Refused::Client)),
        }
    }

    /// Counts the place of `permit` as one of `client`, which may have got others meanwhile.
    fn give(
        self: &Arc<Self>,
        client: IpAddr,
        permit: OwnedSemaphorePermit,
    ) -> Result<Arc<Place>, Refused> {
        let mut state = self.lock();
        let held = state.clients.entry(client).or_default();
        if *held >= self.per_client {
            drop(state);
            return Err(self.refuse(Refused::Client));
        }
        *held += 1;
        drop(state);
        self.counts.connections.inc();
        Ok(Arc::new(Place {
            places: Arc::clone(self),
            client,
            _permit: permit,
        }))
    }

    fn refuse(&self, refused: Refused) -> Refused {
        let reason = refused.reason();
        self.counts.refused.get_or_create(&reason).inc();
        refused
    }

    async fn room(&self) -> Option<OwnedSemaphorePermit> {
        let mut look = Instant::now();
        loop {
            // A place that is free is taken even if the time is over.
            let permit = timeout_at(look, Arc::clone(&self.room).acquire_owned()).await;
            if let Ok(Ok(permit)) = permit {
                self.lock().full_since = None;
                return Some(permit);
            }
            look = self.make_room(Instant::now())?;
        }
    }

    /// Has the connection give way that has waited longest for a request, if that is long enough.
    /// Returns when to look again, or nothing if there has been no place for too long.
    fn make_room(&self, now: Instant) -> Option<Instant> {
        let mut state = self.lock();
        let until = *state.full_since.get_or_insert(now) + FULL;
        let mut look = now + GRACE;
        if let Some(first) = state.waiting.first_entry() {
            let long_enough = first.get().since + GRACE;
            if long_enough <= now {
                first.remove().give_way.cancel();
                return Some(look);
            }
            look = long_enough;
        }
        (now < until).then_some(look.min(until))
    }

    /// Puts a connection among those that wait for a request.
    fn wait(&self, give_way: &CancellationToken) -> Doing {
        let mut state = self.lock();
        let (number, since) = (state.next, Instant::now());
        state.next += 1;
        let give_way = give_way.clone();
        state.waiting.insert(number, Waiting { since, give_way });
        Doing::Waits(number, since)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic leaves it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Refused {
    fn reason(self) -> Reason {
        let reason = match self {
            Self::Client => "client",
            Self::Full => "full",
        };
        Reason { reason }
    }
}

/// A place among those of a listener, until it is dropped.
pub(crate) struct Place {
    places: Arc<Places>,
    client: IpAddr,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// The place for one more request of a connection whose own is `own`, which the first of its
    /// requests has. Each further one at the same time takes a place of its own.
    pub(crate) fn for_request(own: &Arc<Self>) -> Result<Arc<Self>, Refused> {
        // One is the connection's.
        match Arc::strong_count(own) > 1 {
            true => own.places.take_now(own.client),
            false => Ok(Arc::clone(own)),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.lock();
        if let Some(held) = state.clients.get_mut(&self.client) {
            *held -= 1;
            if *held == 0 {
                state.clients.remove(&self.client);
            }
        }
        self.places.counts.connections.dec();
    }
}

/// What a connection does: it waits for a request, at first, or has some.
pub(crate) struct Activity {
    places: Arc<Places>,
    give_way: CancellationToken,
    doing: Mutex<Doing>,
}

enum Doing {
    /// Its number among those that wait, and since when.
    Waits(u64, Instant),
    /// How many requests it has.
    Answers(usize),
}

impl Activity {
    pub(crate) fn new(place: &Place) -> Arc<Self> {
        let (places, give_way) = (Arc::clone(&place.places), CancellationToken::new());
        let doing = Mutex::new(places.wait(&give_way));
        Arc::new(Self {
            places,
            give_way,
            doing,
        })
    }

    /// A request has come; it ends with what is returned.
    pub(crate) fn begin(self: &Arc<Self>) -> Busy {
        let mut doing = self.doing();
        *doing = match *doing {
            Doing::Waits(number, _) => {
                self.places.lock().waiting.remove(&number);
                Doing::Answers(1)
            }
            Doing::Answers(count) => Doing::Answers(count + 1),
        };
        drop(doing);
        Busy(Arc::clone(self))
    }

    /// Returns when the connection should give way to another one.
    pub(crate) fn gives_way(&self) -> impl Future<Output = ()> + Send + use<> {
        self.give_way.clone().cancelled_owned()
    }

    /// Returns when there has been no request for `most`.
    pub(crate) async fn idle(self: Arc<Self>, most: Duration) {
        loop {
            let until = match *self.doing() {
                Doing::Waits(_, since) => since + most,
                Doing::Answers(_) => Instant::now() + most,
            };
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    fn end_request(&self) {
        let mut doing = self.doing();
        *doing = match *doing {
            Doing::Answers(count) if count > 1 => Doing::Answers(count - 1),
            _ => self.places.wait(&self.give_way),
        };
    }

    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        if let Doing::Waits(number, _) = *self.doing() {
            self.places.lock().waiting.remove(&number);
        }
    }
}

/// A request of a connection.
pub(crate) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end_request();
    }
}

/// A request's place. Its connection has a request as long as this is kept.
pub struct Hold {
    _busy: Busy,
    _place: Arc<Place>,
}

impl Hold {
    pub(crate) fn new(activity: &Arc<Activity>, place: Arc<Place>) -> Arc<Self> {
        Arc::new(Self {
            _busy: activity.begin(),
            _place: place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[tokio::test(start_paused = true)]
    async fn one_client_does_not_get_all_places() {
        let counts = Counts::default();
        let places = Places::new(3, 2, counts.clone());
        let first = places.take(A).await.ok().unwrap();
        let _second = places.take(A).await.ok().unwrap();
        assert_eq!(places.take(A).await.err(), Some(Refused::Client));
        let other = places.take(B).await.ok().unwrap();
        assert_eq!(counts.connections.get(), 3);
        drop((first, other));
        assert!(places.take(A).await.is_ok());
        let refused = counts.refused.get_or_create(&Refused::Client.reason());
        assert_eq!(refused.get(), 1);
        assert!(!places.lock().clients.contains_key(&B));
    }

    #[tokio::test(start_paused = true)]
    async fn each_further_request_of_a_connection_takes_a_place() {
        let counts = Counts::default();
        let places = Places::new(3, 2, counts.clone());
        let own = places.take(A).await.ok().unwrap();
        let first = Place::for_request(&own).ok().unwrap();
        assert_eq!(counts.connections.get(), 1);
        let second = Place::for_request(&own).ok().unwrap();
        assert_eq!(counts.connections.get(), 2);
        assert_eq!(Place::for_request(&own).err(), Some(Refused::Client));
        let _other = places.take(B).await.ok().unwrap();
        drop(first);
        // The connection's own is free again.
        let third = Place::for_request(&own).ok().unwrap();
        assert_eq!(counts.connections.get(), 3);
        drop((second, third, own));
        assert_eq!(counts.connections.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_waits_when_its_last_request_has_ended() {
        let places = Places::new(1, 1, Counts::default());
        let place = places.take(A).await.ok().unwrap();
        let activity = Activity::new(&place);
        let (first, second) = (activity.begin(), activity.begin());
        drop(first);
        assert!(places.lock().waiting.is_empty());
        let idle = Arc::clone(&activity).idle(GRACE);
        assert!(tokio::time::timeout(GRACE * 3, idle).await.is_err());
        drop(second);
        assert_eq!(places.lock().waiting.len(), 1);
        let start = Instant::now();
        activity.idle(GRACE).await;
        assert_eq!(start.elapsed(), GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_waited_longest_for_a_request_gives_way() {
        let places = Places::new(2, 2, Counts::default());
        let (first, second) = (places.take(A).await, places.take(A).await);
        let (first, second) = (first.ok().unwrap(), second.ok().unwrap());
        let (older, newer) = (Activity::new(&first), Activity::new(&second));
        // It has had a request since.
        drop(older.begin());
        let start = Instant::now();
        let ends = async {
            newer.gives_way().await;
            drop(second);
        };
        let (taken, ()) = tokio::join!(places.take(B), ends);
        assert!(taken.is_ok() && !older.give_way.is_cancelled());
        assert!(start.elapsed() >= GRACE && start.elapsed() < FULL);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_do_not_give_way_and_new_clients_are_told() {
        let places = Places::new(1, 1, Counts::default());
        let place = places.take(A).await.ok().unwrap();
        let activity = Activity::new(&place);
        let busy = activity.begin();
        let start = Instant::now();
        assert_eq!(places.take(B).await.err(), Some(Refused::Full));
        assert_eq!(start.elapsed(), FULL);
        // Nobody else has to wait for that.
        assert_eq!(places.take(B).await.err(), Some(Refused::Full));
        assert_eq!(start.elapsed(), FULL);
        assert!(!activity.give_way.is_cancelled());
        drop((busy, activity, place));
        assert!(places.take(B).await.is_ok());
        assert!(places.lock().waiting.is_empty());
    }
}
