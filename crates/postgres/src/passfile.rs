//! The password file of libpq: `host:port:database:user:password`, the first line that fits counts.
//! <https://www.postgresql.org/docs/current/libpq-pgpass.html>

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What a line must fit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account<'a> {
    /// Host name as configured; `localhost` for the default unix socket.
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) database: &'a str,
    pub(crate) user: &'a str,
}

/// Looks a password up. A file that others can read is passed over with a warning, as libpq does.
pub(crate) fn lookup(file: &Path, account: Account<'_>) -> Option<String> {
    let metadata = fs::metadata(file).ok()?;
    if !metadata.is_file() {
        tracing::warn!(file = %file.display(), "password file is not a plain file and is not used");
        return None;
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            file = %file.display(),
            "password file has group or world access and is not used; permissions should be u=rw (0600) or less"
        );
        return None;
    }
    find(&fs::read_to_string(file).ok()?, account)
}

fn find(content: &str, account: Account<'_>) -> Option<String> {
    let port = account.port.to_string();
    let wanted = [account.host, &port, account.database, account.user];
    content.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = fields(line).into_iter();
        for wanted in wanted {
            let (raw_star, text) = fields.next()?;
            if !raw_star && text != wanted {
                return None;
            }
        }
        fields.next().map(|(_, password)| password)
    })
}

/// The five fields of a line without their escapes, each with whether it is an unescaped `*`.
fn fields(line: &str) -> Vec<(bool, String)> {
    let mut fields = vec![String::new()];
    let mut stars = vec![false];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let (c, escaped) = if c == '\\' { (chars.next().unwrap_or('\\'), true) } else { (c, false) };
        if c == ':' && !escaped && fields.len() < 5 {
            fields.push(String::new());
            stars.push(false);
        } else if let (Some(field), Some(star)) = (fields.last_mut(), stars.last_mut()) {
            *star = field.is_empty() && c == '*' && !escaped;
            field.push(c);
        }
    }
    stars.into_iter().zip(fields).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_line_that_fits_counts() {
        let content =
            "# comment\nh:1:db:me:one\nh:*:*:me:two\n*:*:*:m\\:e:th\\\\r:ee\n\\*:*:*:x:no\nbroken\n";
        let find = |host, port, database, user| find(content, Account { host, port, database, user });
        assert_eq!(find("h", 1, "db", "me").as_deref(), Some("one"));
        assert_eq!(find("h", 2, "db", "me").as_deref(), Some("two"));
        assert_eq!(find("other", 2, "db", "m:e").as_deref(), Some("th\\r:ee"));
        assert_eq!(find("other", 2, "db", "x"), None);
        assert_eq!(find("*", 2, "db", "x").as_deref(), Some("no"));
        assert_eq!(find("other", 2, "db", "me"), None);
    }
}
