// SPDX-License-Identifier: GPL-2.0-only
/* The socket options that matter to a server. */
#include <linux/sizes.h>
#include <linux/tcp.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include "socket_offload.h"

static u32 traffic_class(const struct sock *sk)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6)
		return inet6_sk(sk)->tclass;
#endif
	return inet_sk(sk)->tos;
}

void skoff_export_options(struct sock *sk, struct skoff_snapshot *snapshot)
{
	const struct inet_connection_sock *icsk = inet_csk(sk);
	const struct tcp_sock *tp = tcp_sk(sk);

	if (tp->nonagle & TCP_NAGLE_OFF)
		snapshot->flags |= SKOFF_NODELAY;
	if (tp->nonagle & TCP_NAGLE_CORK)
		snapshot->flags |= SKOFF_CORK;
	if (sock_flag(sk, SOCK_KEEPOPEN))
		snapshot->flags |= SKOFF_KEEPALIVE;
	snapshot->keepalive_idle = keepalive_time_when(tp) / HZ;
	snapshot->keepalive_interval = keepalive_intvl_when(tp) / HZ;
	snapshot->keepalive_count = keepalive_probes(tp);
	snapshot->send_buffer = sk->sk_sndbuf;
	snapshot->receive_buffer = sk->sk_rcvbuf;
	snapshot->buffer_lock = sk->sk_userlocks & SOCK_BUF_LOCK_MASK;
	snapshot->traffic_class = traffic_class(sk);
	snapshot->mark = sk->sk_mark;
	snapshot->priority = sk->sk_priority;
	snapshot->user_timeout = icsk->icsk_user_timeout;
	strscpy(snapshot->congestion, icsk->icsk_ca_ops->name, sizeof(snapshot->congestion));
}

static int set(struct socket *sock, int level, int name, int value)
{
	sockptr_t at = KERNEL_SOCKPTR(&value);

	if (level == SOL_SOCKET)
		return sock_setsockopt(sock, level, name, at, sizeof(value));
	return sock->sk->sk_prot->setsockopt(sock->sk, level, name, at, sizeof(value));
}

static int set_keepalive(struct socket *sock, const struct skoff_snapshot *snapshot)
{
	return set(sock, SOL_TCP, TCP_KEEPIDLE, snapshot->keepalive_idle) ?:
	       set(sock, SOL_TCP, TCP_KEEPINTVL, snapshot->keepalive_interval) ?:
	       set(sock, SOL_TCP, TCP_KEEPCNT, snapshot->keepalive_count) ?:
	       set(sock, SOL_SOCKET, SO_KEEPALIVE, 1);
}

/* A congestion control that this kernel lacks is left at its default. */
static void set_congestion(struct socket *sock, const struct skoff_snapshot *snapshot)
{
	struct sock *sk = sock->sk;

	if (snapshot->congestion[0] &&
	    strncmp(snapshot->congestion, inet_csk(sk)->icsk_ca_ops->name, SKOFF_CA_NAME))
		sk->sk_prot->setsockopt(sk, SOL_TCP, TCP_CONGESTION,
					KERNEL_SOCKPTR((void *)snapshot->congestion),
					strnlen(snapshot->congestion, SKOFF_CA_NAME - 1));
}

/* On a closed socket: the route is looked up, and the congestion control begins, with them. */
int skoff_import_options(struct socket *sock, const struct skoff_snapshot *snapshot)
{
	int level = sock->sk->sk_family == AF_INET6 ? SOL_IPV6 : SOL_IP;
	int name = level == SOL_IP ? IP_TOS : IPV6_TCLASS;
	int err = 0;

	if (snapshot->flags & SKOFF_NODELAY)
		err = set(sock, SOL_TCP, TCP_NODELAY, 1);
	if (!err && (snapshot->flags & SKOFF_CORK))
		err = set(sock, SOL_TCP, TCP_CORK, 1);
	if (!err && (snapshot->flags & SKOFF_KEEPALIVE))
		err = set_keepalive(sock, snapshot);
	if (!err && snapshot->traffic_class)
		err = set(sock, level, name, snapshot->traffic_class);
	if (!err && snapshot->user_timeout)
		err = set(sock, SOL_TCP, TCP_USER_TIMEOUT, snapshot->user_timeout);
	if (!err && snapshot->priority)
		err = set(sock, SOL_SOCKET, SO_PRIORITY, snapshot->priority);
	if (!err)
		set_congestion(sock, snapshot);
	return err;
}

/*
 * With room for the queues that come. A blob is no reason for more than autotuning or
 * setsockopt(2) give. Under the socket lock.
 */
void skoff_import_buffers(struct sock *sk, const struct skoff_snapshot *snapshot)
{
	const struct netns_ipv4 *net = &sock_net(sk)->ipv4;
	u32 most_send = max_t(u32, net->sysctl_tcp_wmem[2], 2 * sysctl_wmem_max);
	u32 most_receive = max_t(u32, net->sysctl_tcp_rmem[2], 2 * sysctl_rmem_max);
	u32 queued = snapshot->unacked_length + snapshot->unsent_length;
	u32 send = min(snapshot->send_buffer, most_send);
	u32 receive = min(snapshot->receive_buffer, most_receive);

	WRITE_ONCE(sk->sk_sndbuf, max_t(u32, send, 2 * queued + SZ_64K));
	WRITE_ONCE(sk->sk_rcvbuf, max_t(u32, receive, SOCK_MIN_RCVBUF));
	sk->sk_userlocks &= ~SOCK_BUF_LOCK_MASK;
	sk->sk_userlocks |= snapshot->buffer_lock & SOCK_BUF_LOCK_MASK;
}
