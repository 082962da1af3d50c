use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::wire::scan;
use super::*;
use crate::session::COPY_DATA;

fn copy_data(content: &[u8]) -> Vec<u8> {
    let mut out = vec![COPY_DATA];
    out.extend((4 + content.len() as u32).to_be_bytes());
    out.extend(content);
    out
}

fn xlog(lsn: u64, payload: &[u8]) -> Vec<u8> {
    copy_data(&[&b"w"[..], &lsn.to_be_bytes(), &lsn.to_be_bytes(), &[0; 8], payload].concat())
}

fn keepalive(wal_end: u64, reply: u8) -> Vec<u8> {
    copy_data(&[&b"k"[..], &wal_end.to_be_bytes(), &[0; 8], &[reply]].concat())
}

struct Server {
    runtime: tokio::runtime::Runtime,
    socket: DuplexStream,
}

impl Server {
    /// A stream whose server is us.
    fn start(from: u64, patience: Duration) -> (Self, ReplicationStream) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (socket, client) = duplex(1 << 16);
        let streaming = Streaming { socket: Box::new(client), input: BytesMut::new(), server: "test".into() };
        let stream =
            ReplicationStream::spawn(session::runtime().unwrap(), Lsn(from), streaming, Some(patience))
                .unwrap();
        (Server { runtime, socket }, stream)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.runtime.block_on(self.socket.write_all(bytes)).unwrap();
    }

    /// The next status update: received, flushed, applied.
    fn status(&mut self) -> [u64; 3] {
        let mut message = [0; 39];
        let read = self.socket.read_exact(&mut message);
        self.runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(10), read).await })
            .unwrap()
            .unwrap();
        assert_eq!((message[0], message[5]), (b'd', b'r'));
        [6, 14, 22].map(|at| u64::from_be_bytes(*message[at..].first_chunk().unwrap()))
    }

    fn status_until(&mut self, wanted: [u64; 3]) {
        while self.status() != wanted {}
    }
}

const LONG: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(10);

#[test]
fn pieces_hold_whole_messages_however_they_come() {
    let (mut server, mut stream) = Server::start(5, LONG);
    let bytes = [xlog(10, b"one"), keepalive(12, 0), xlog(11, b"")].concat();
    let mut seen = Vec::new();
    for byte in &bytes {
        server.send(&[*byte]);
    }
    while seen.len() < 3 {
        let piece = stream.receive(SOON).unwrap().unwrap();
        seen.extend(piece.frames().map(|frame| format!("{frame:?}")));
    }
    let data = |lsn, payload| format!("{:?}", Frame::Data { lsn: Lsn(lsn), payload });
    let alive = format!("{:?}", Frame::Keepalive { wal_end: Lsn(12), reply_requested: false });
    assert_eq!(seen, [data(10, b"one"), alive, data(11, b"")]);
}

#[test]
fn a_status_claims_what_was_received_and_acknowledged_and_only_grows() {
    let (mut server, mut stream) = Server::start(5, LONG);
    server.status_until([5, 0, 0]);
    server.send(&xlog(10, b"x"));
    stream.receive(SOON).unwrap().unwrap();
    stream.acknowledge(Lsn(8));
    server.status_until([10, 8, 8]);
    stream.acknowledge(Lsn(7));
    server.send(&[xlog(9, b"y"), keepalive(9, 1)].concat());
    server.status_until([10, 8, 8]);
    // Nobody can have made durable what has not been received.
    stream.acknowledge(Lsn(99));
    server.status_until([10, 10, 10]);
}

#[test]
fn h11_a_reply_is_sent_at_once_though_nobody_consumes() {
    let (mut server, stream) = Server::start(5, LONG);
    server.status_until([5, 0, 0]);
    server.send(&keepalive(20, 1));
    server.status_until([20, 0, 0]);
    drop(stream);
}

#[test]
fn acknowledgements_and_signs_of_life_go_on_when_the_consumer_sleeps() {
    let (mut server, stream) = Server::start(5, Duration::from_millis(60));
    // More than may be in flight: the last writes wait in the socket for ever.
    let row = xlog(10, &vec![0; 1 << 20]);
    let writer = async {
        for _ in 0..12 {
            if tokio::time::timeout(Duration::from_millis(300), server.socket.write_all(&row)).await.is_err()
            {
                return true;
            }
        }
        false
    };
    assert!(server.runtime.block_on(writer), "the task reads without bound");
    for _ in 0..5 {
        server.status();
    }
    stream.acknowledge(Lsn(10));
    server.status_until([10, 10, 10]);
}

#[test]
fn a_message_longer_than_the_bound_passes_alone() {
    let (mut server, mut stream) = Server::start(5, LONG);
    let payload = vec![7; MAX_IN_FLIGHT + 100];
    let bytes = xlog(10, &payload);
    let Server { runtime, socket } = &mut server;
    runtime.block_on(async {
        let sent = socket.write_all(&bytes);
        tokio::time::timeout(SOON, sent).await.unwrap().unwrap();
    });
    let piece = stream.receive(SOON).unwrap().unwrap();
    assert_eq!(piece.frames().collect::<Vec<_>>(), [Frame::Data { lsn: Lsn(10), payload: &payload }]);
}

#[test]
fn the_end_comes_after_what_was_sent_before_it() {
    let (mut server, mut stream) = Server::start(5, LONG);
    server.send(&[xlog(10, b"last"), b"c\0\0\0\x04".to_vec()].concat());
    assert_eq!(stream.receive(SOON).unwrap().unwrap().frames().count(), 1);
    let error = stream.receive(SOON).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "test: server is shutting down");
    assert!(stream.receive(SOON).is_err());

    let (mut server, mut stream) = Server::start(5, LONG);
    server.send(b"E\0\0\0\x1dSFATAL\0C57P01\0Mshutdown\0\0");
    let error = stream.receive(SOON).map(drop).unwrap_err();
    assert_eq!(error.server_error().map(|e| e.code.as_str()), Some("57P01"), "{error}");

    let (mut server, mut stream) = Server::start(5, LONG);
    let reload = b"S\0\0\0\x08a\0b\0N\0\0\0\x13C00000\0Mhello\0\0".to_vec();
    server.send(&[reload, xlog(10, b"x")].concat());
    assert_eq!(stream.receive(SOON).unwrap().unwrap().frames().count(), 1, "a notice ends nothing");
    server.send(b"N\0\0\0\x15C55000\0Mskipped\0\0");
    let error = stream.receive(SOON).map(drop).unwrap_err();
    assert!(error.server_error().is_some_and(ServerError::slot_is_unusable), "{error}");

    let (mut server, mut stream) = Server::start(5, LONG);
    server.send(&copy_data(b"?"));
    let error = stream.receive(SOON).map(drop).unwrap_err();
    assert!(error.to_string().contains("not the replication protocol"), "{error}");
}

#[test]
fn dropping_the_stream_sends_the_last_acknowledgement_and_ends_the_copy() {
    let (mut server, stream) = Server::start(5, LONG);
    server.status_until([5, 0, 0]);
    server.send(&keepalive(20, 1));
    server.status_until([20, 0, 0]);
    stream.acknowledge(Lsn(20));
    drop(stream);
    server.status_until([20, 20, 20]);
    let mut rest = Vec::new();
    server.runtime.block_on(server.socket.read_to_end(&mut rest)).unwrap();
    assert!(rest.ends_with(b"c\0\0\0\x04X\0\0\0\x04"), "{rest:?}");
}

#[test]
fn only_load_makes_the_reader_rest() {
    let mut pace = Pace::default();
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    for i in 0..BUSY_READS {
        pace.note(100, false, at(u64::from(i)));
        assert!(!pace.busy());
    }
    pace.note(100, false, at(u64::from(BUSY_READS)));
    assert!(pace.busy());
    pace.note(SMALL_READ, true, at(9));
    assert!(!pace.busy(), "a large read needs no rest");
    (10..30).for_each(|ms| pace.note(WORTH_A_REST, pace.busy(), at(ms)));
    assert!(pace.busy());
    pace.note(WORTH_A_REST - 1, true, at(30));
    assert!(!pace.busy(), "a rest that brought little was not worth it");
    (31..50).for_each(|ms| pace.note(WORTH_A_REST, pace.busy(), at(ms)));
    pace.note(100, true, at(500));
    assert!(!pace.busy(), "an idle link has no load");
}

#[test]
fn no_bytes_make_the_scan_panic() {
    let whole = [xlog(1, b"abc"), keepalive(2, 1), b"c\0\0\0\x04".to_vec()].concat();
    for cut in 0..=whole.len() {
        for at in 0..cut {
            let mut bytes = whole[..cut].to_vec();
            bytes[at] ^= 0xff;
            if let Ok(scan) = scan(&bytes) {
                assert!(scan.copy.length <= bytes.len());
            }
        }
    }
    let result = scan(&whole).unwrap();
    assert_eq!(
        (result.copy.length, result.copy.other, result.received),
        (whole.len() - 5, Some(b'c'), Lsn(2))
    );
    assert!(result.reply_requested);
}
