"""A connection: a non-blocking socket that trio waits for, plain or TLS, a server's end or a client's.

`trio.SSLStream` holds a reference to itself, so that only the cyclic collector frees it, and carries
every byte through two memory buffers. Here OpenSSL reads and writes the socket itself. What
`trio.SSLStream` promises is promised here as well, and trio's own tests of a stream run over it.

Invariants: where TLS was asked for, nothing is read or written in the clear. A stream that failed or
was cancelled while it sent sends nothing more, not even close_notify: half a record may be on its way.
A peer that ends without close_notify has ended, which HTTP's own framing judges. A client that has not
sent a byte costs a server no OpenSSL state. One task may send while another one receives.
"""

from __future__ import annotations

import _ssl
import operator
import socket
import ssl
from typing import Any

import trio

RECEIVE_BYTES = 16 * 1024
# A peer that goes without close_notify: bytes of ours unread, or gone before OpenSSL could send an alert.
# Python 3.13 raises these where older ones report the end of the connection.
_CUT = (ConnectionResetError, BrokenPipeError)


class SocketStream(trio.abc.Stream):
    """A connection that was accepted or opened.

    Args:
        sock: a connected stream socket; the stream closes it.
        context: for TLS; None for plaintext.
        server_name: what the server's certificate must be for; makes this the client's end.
        peer: the peer's IP address and port, where accept(2) has told them already.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        *,
        server_name: str | None = None,
        peer: tuple[str, int] | None = None,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._context = context
        self._server_name = server_name
        self._peer = peer
        self._heard = False
        self._ready = context is None  # TLS: the handshake is done
        self._failed = False  # TLS: the handshake failed; OpenSSL is not asked again, it might wait
        self._sound = context is None  # nothing is half sent
        self._unfinished = False  # `send_now` left something to `send_all`
        self._ended = False  # nothing more is to be sent
        self._closed = False
        self._sending = False
        self._receiving = False
        self._writable: trio.Event | None = None  # there while a task waits for it

    @property
    def socket(self) -> socket.socket:
        """For its names and options. Reading or writing it breaks the stream."""
        return self._socket

    def peer(self) -> tuple[str, int] | None:
        """The peer's IP address and port; None where the peer is not on an IP network.

        Raises:
            trio.BrokenResourceError: it is gone, and its address was not known before.
        """
        if self._peer is None and self._socket.family in (socket.AF_INET, socket.AF_INET6):
            try:
                self._peer = self._socket.getpeername()[:2]
            except OSError as exc:
                raise trio.BrokenResourceError("the peer is gone") from exc
        return self._peer

    @property
    def is_tls(self) -> bool:
        """True where all that is sent is encrypted."""
        return self._context is not None

    @property
    def heard(self) -> bool:
        """True once a server's handshake has had a byte: a probe of the port sends none."""
        return self._heard

    def certificate(self) -> bytes | None:
        """The peer's certificate, DER, as TLS has verified it; None where it showed none."""
        if not isinstance(self._socket, ssl.SSLSocket):
            return None
        return self._socket.getpeercert(binary_form=True)

    def verified_chain(self) -> tuple[bytes, ...]:
        """From the peer's certificate to the CA that is trusted, DER, as TLS has verified them.

        Empty where the peer showed none, and where a session was resumed, which keeps the first alone.
        """
        if not isinstance(self._socket, ssl.SSLSocket):
            return ()
        public = getattr(self._socket, "get_verified_chain", None)  # Python 3.13
        if public is not None:
            return tuple(public())
        ssl_object: Any = self._socket._sslobj  # type: ignore[attr-defined]
        return tuple(
            each.public_bytes(_ssl.ENCODING_DER) for each in ssl_object.get_verified_chain() or ()
        )

    async def do_handshake(self) -> None:
        """TLS's handshake; nothing for plaintext or where it is done.

        Raises:
            trio.BrokenResourceError: it failed; the cause is what OpenSSL or the system said. There is
                no cause where the client left without a byte.
        """
        if self._sending or self._receiving:
            raise trio.BusyResourceError("another task uses this stream")
        self._check_open()
        if self._ready or self._context is None:
            await trio.lowlevel.checkpoint()
            return
        if self._failed:
            raise trio.BrokenResourceError("an earlier TLS handshake failed")
        self._sending = self._receiving = True
        try:
            if not isinstance(self._socket, ssl.SSLSocket):
                if self._server_name is None:
                    await self._hear()
                self._wrap(self._context)
            await self._shake_hands()
        finally:
            self._sending = self._receiving = False

    async def receive_before_tls(self, count: int) -> bytes:
        """Exactly so many bytes, before a handshake and not decrypted: a proxy's header about the client.

        Raises:
            trio.BrokenResourceError: the connection failed, or ended before.
            trio.BusyResourceError: TLS has begun.
        """
        if isinstance(self._socket, ssl.SSLSocket):
            raise trio.BusyResourceError("TLS has begun")
        data = b""
        while len(data) < count:
            self._check_open()
            await trio.lowlevel.wait_readable(self._socket)
            try:
                part = self._socket.recv(count - len(data))
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError("the connection failed") from exc
            if not part:
                raise trio.BrokenResourceError("the peer left before it said who the client is")
            data += part
        return data

    async def _hear(self) -> None:
        """Wait for the first byte and leave it where it is."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                self._heard = bool(self._socket.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError("the client is gone") from exc
            if not self._heard:
                raise trio.BrokenResourceError("the client left without a byte")
            return

    def _wrap(self, context: ssl.SSLContext) -> None:
        try:
            self._socket = context.wrap_socket(
                self._socket,
                server_side=self._server_name is None,
                server_hostname=self._server_name,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=True,
            )
        except (OSError, ValueError) as exc:
            self._closed = True
            self._socket.close()  # where the SSL module has not taken the descriptor, and closed it
            raise trio.BrokenResourceError("the peer is gone") from exc

    async def _shake_hands(self) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        while True:
            try:
                self._socket.do_handshake()
                break
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._socket)
            except ssl.SSLWantWriteError:
                await self._until_writable()
            except (OSError, ValueError) as exc:
                self._failed = True
                raise trio.BrokenResourceError("the TLS handshake failed") from exc
        self._ready = self._sound = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes; none where the client has ended, be it with or without close_notify.

        Raises:
            trio.BrokenResourceError: the connection failed, or is TLS and had no handshake.
            trio.ClosedResourceError: this side has closed it.
        """
        most = RECEIVE_BYTES if max_bytes is None else operator.index(max_bytes)
        if most < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task receives")
        self._check_ready()
        self._receiving = True
        try:
            if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self._socket)
            while True:
                self._check_open()
                try:
                    return self._socket.recv(most)
                except (BlockingIOError, ssl.SSLWantReadError):
                    await trio.lowlevel.wait_readable(self._socket)
                except ssl.SSLWantWriteError:
                    await self._until_writable()
                except (OSError, ValueError) as exc:
                    if isinstance(exc, _CUT) and isinstance(self._socket, ssl.SSLSocket):
                        return b""
                    raise trio.BrokenResourceError("the connection failed") from exc
        finally:
            self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send it all. Where this is cancelled, nothing more can be sent.

        Raises:
            trio.BrokenResourceError: the connection failed, or is TLS and had no handshake.
            trio.ClosedResourceError: this side has closed it, or its sending half.
        """
        self._check_ready()
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            self._check_sound()
            self._sound = False
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    try:
                        sent += self._socket.send(view[sent:])
                    except (BlockingIOError, ssl.SSLWantWriteError):
                        await self._until_writable()
                        self._check_open()
                    except (OSError, ValueError) as exc:
                        # SSLWantReadError among them: a server never renegotiates.
                        raise trio.BrokenResourceError("the connection failed") from exc
            self._sound = True
            self._unfinished = False
        finally:
            self._sending = False

    def send_now(self, data: bytes) -> int:
        """Send what the system takes at once: no checkpoint, no deadline to set.

        Returns:
            How many bytes; the rest is for `send_all`.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: see `send_all`.
        """
        self._check_ready()
        self._begin_sending()
        self._sending = False
        self._check_sound()
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except (OSError, ValueError) as exc:
            self._sound = False
            raise trio.BrokenResourceError("the connection failed") from exc
        self._unfinished = sent < len(data)
        return sent

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        self._check_ready()
        self._begin_sending()
        try:
            await self._until_writable()
        finally:
            self._sending = False

    async def end_sending(self) -> None:
        """Say that nothing more comes: close_notify where it is TLS, and TCP's end.

        What the client still sends can be read away with `discard_some`. Both work after a handshake
        that failed, too: closing on bytes that nobody read resets the connection, and a reset overtakes
        the alert that says why.

        Raises:
            trio.BrokenResourceError: the client is gone.
            trio.ClosedResourceError: this side has closed it, or its sending half.
        """
        self._check_open()
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            await self._close_tls()
            self._ended = True
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as exc:
                raise trio.BrokenResourceError("the connection failed") from exc
        finally:
            self._sending = False

    async def discard_some(self) -> bool:
        """Discard what the client sends, without decrypting it; False where it has ended.

        Raises:
            trio.BrokenResourceError: the connection failed.
            trio.ClosedResourceError: this side has closed it.
        """
        while True:
            self._check_open()
            await trio.lowlevel.wait_readable(self._socket)
            try:
                # Past OpenSSL, which may have failed, or sent close_notify.
                return bool(socket.socket.recv(self._socket, RECEIVE_BYTES))
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError("the connection failed") from exc

    async def aclose(self) -> None:
        """Close; TLS says so first, and does not wait for the other side to say it too."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await trio.lowlevel.checkpoint()
            await self._close_tls()
        finally:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def _close_tls(self) -> None:
        """Send close_notify where that can still be understood."""
        whole = self._sound and not self._unfinished
        while isinstance(self._socket, ssl.SSLSocket) and whole and not self._ended:
            try:
                self._socket.unwrap()
                return
            except ssl.SSLWantWriteError:
                await self._until_writable()
            except (OSError, ValueError):
                return  # SSLWantReadError: ours is sent; the client's is not waited for

    async def _until_writable(self) -> None:
        """Wait for room to send; trio lets one task wait for that, and here a second one may."""
        if self._writable is not None:
            await self._writable.wait()
            return
        self._writable = trio.Event()
        try:
            await trio.lowlevel.wait_writable(self._socket)
        finally:
            self._writable.set()
            self._writable = None

    def _begin_sending(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task sends")
        if self._ended:
            raise trio.ClosedResourceError("the sending half was closed")
        self._sending = True

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    def _check_ready(self) -> None:
        self._check_open()
        if not self._ready:
            raise trio.BrokenResourceError("TLS without a handshake that succeeded")

    def _check_sound(self) -> None:
        self._check_open()
        if not self._sound:
            raise trio.BrokenResourceError("an earlier send failed or was cancelled")
