//! Between a sink and Redis: counts what is asked, and can come between.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use testkit::services::Redis;

/// What happens at a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    /// It does not reach Redis.
    Before,
    /// Redis runs it, and nobody hears of it.
    After,
}

type Hook = Box<dyn FnMut(usize) -> Option<Cut> + Send>;

/// A port that leads to Redis. From the first cut on it leads nowhere.
pub(crate) struct Proxy {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Proxy {
    /// `at` is called before each request, with its number from 0 on.
    pub(crate) fn start(redis: &Redis, at: impl FnMut(usize) -> Option<Cut> + Send + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (target, requests) = (redis.port(), Arc::new(AtomicUsize::new(0)));
        let (counted, hook): (_, Arc<Mutex<Hook>>) = (requests.clone(), Arc::new(Mutex::new(Box::new(at))));
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let server = TcpStream::connect(("127.0.0.1", target)).unwrap();
                if serve(client, server, &counted, &hook).is_none() {
                    return;
                }
            }
        });
        Proxy { port, requests }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// One connection, on which question and answer take turns; nothing after a cut.
fn serve(
    mut client: TcpStream,
    mut server: TcpStream,
    requests: &AtomicUsize,
    hook: &Mutex<Hook>,
) -> Option<()> {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut buffer, mut answered) = (vec![0; 1 << 20], true);
    loop {
        client.set_read_timeout(Some(Duration::from_micros(200))).unwrap();
        match client.read(&mut buffer) {
            Ok(0) => return Some(()),
            Ok(length) => {
                let cut = answered.then(|| (hook.lock().unwrap())(requests.fetch_add(1, Ordering::SeqCst)));
                answered = false;
                match cut.flatten() {
                    Some(Cut::Before) => return None,
                    Some(Cut::After) => {
                        swallow(&mut client, &mut server, &buffer[..length]);
                        return None;
                    }
                    None => server.write_all(&buffer[..length]).ok()?,
                }
            }
            Err(_) => {}
        }
        server.set_read_timeout(Some(Duration::from_micros(200))).unwrap();
        match server.read(&mut buffer) {
            Ok(0) => return Some(()),
            Ok(length) => {
                answered = true;
                client.write_all(&buffer[..length]).ok()?;
            }
            Err(_) => {}
        }
    }
}

/// Hands a whole request on, and waits for the answer, which goes nowhere.
fn swallow(client: &mut TcpStream, server: &mut TcpStream, begin: &[u8]) {
    let mut buffer = vec![0; 1 << 20];
    server.write_all(begin).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    loop {
        if let Ok(length @ 1..) = client.read(&mut buffer) {
            server.write_all(&buffer[..length]).unwrap();
        } else if let Ok(1..) = server.read(&mut buffer) {
            return;
        }
    }
}
