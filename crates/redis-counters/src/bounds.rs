//! How much is held in memory, and how much one script carries.

/// Bounds of what a sink holds and sends. Where a group is slow to write, scripts carry less
/// ([`Server::longest_script`](crate::Server::longest_script)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Changed groups at which a batch of source transactions is committed. A script carries at most twice as many; a
    /// transaction that changes more is written in pieces.
    pub script_groups: usize,
    /// The same in bytes.
    pub script_bytes: usize,
    /// Changed groups that are held at all. What one source transaction changes beyond that is written before it ends, where
    /// no reader sees it.
    pub held_groups: usize,
    /// The same in bytes.
    pub held_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { script_groups: 50_000, script_bytes: 6 << 20, held_groups: 500_000, held_bytes: 128 << 20 }
    }
}
