// SPDX-License-Identifier: Apache-2.0

//! Who may use the router.

use hyper::header::{AUTHORIZATION, HeaderMap};
use subtle::ConstantTimeEq;

use crate::refusal::Refusal;

/// Neither a token nor the word of the administrator that none is needed.
#[derive(Debug, thiserror::Error)]
#[error("neither a token is set, nor --allow-unauthenticated")]
pub struct NoAuth;

/// What a request must show.
pub enum Auth {
    /// Nothing: who reaches the router may use it.
    Open,
    /// `Authorization: Bearer TOKEN`.
    Token(Box<[u8]>),
}

impl Auth {
    /// A token goes before `is_open`; one of nothing but space is none.
    ///
    /// # Errors
    /// When there is no token and it is not open.
    pub fn new(token: Option<&str>, is_open: bool) -> Result<Self, NoAuth> {
        match token.map(str::trim).filter(|t| !t.is_empty()) {
            Some(token) => Ok(Self::Token(token.as_bytes().into())),
            None if is_open => Ok(Self::Open),
            None => Err(NoAuth),
        }
    }

    /// Whether a request with these headers is let in.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Self::Token(wanted) = self else {
            return Ok(());
        };
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let (Some(only), None) = (given.next(), given.next()) else {
            return Err(Refusal::NoToken);
        };
        let token = bearer(only.as_bytes()).ok_or(Refusal::NoToken)?;
        // In a time that says nothing of how much of it was right.
        if bool::from(token.ct_eq(wanted)) {
            Ok(())
        } else {
            Err(Refusal::WrongToken)
        }
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(auth: &Auth, values: &[&str]) -> Result<(), Refusal> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        auth.check(&headers)
    }

    #[test]
    fn open_is_only_what_is_said_to_be() {
        assert!(Auth::new(None, false).is_err());
        assert!(Auth::new(Some(" \n"), false).is_err());
        assert!(check(&Auth::new(None, true).unwrap(), &[]).is_ok());
        let both = Auth::new(Some("secret"), true).unwrap();
        assert!(check(&both, &[]).is_err());
    }

    #[test]
    fn the_token_is_the_whole_of_it() {
        let auth = Auth::new(Some("secret\n"), false).unwrap();
        for right in ["Bearer secret", "bearer secret", "BEARER  secret "] {
            assert!(check(&auth, &[right]).is_ok(), "{right}");
        }
        for wrong in ["Bearer secre", "Bearer secrets", "Bearer Secret"] {
            assert_eq!(check(&auth, &[wrong]), Err(Refusal::WrongToken), "{wrong}");
        }
        for none in ["", "Bearer", "Bearer ", "Basic secret", "secret"] {
            assert_eq!(check(&auth, &[none]), Err(Refusal::NoToken), "{none}");
        }
        let twice = ["Bearer secret", "Bearer secret"];
        assert_eq!(check(&auth, &twice), Err(Refusal::NoToken));
    }
}
