// SPDX-License-Identifier: GPL-2.0-only
/* The device: one open file per user, a handshake, then calls on sockets. */
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/uaccess.h>
#include "compat.h"
#include "socket_offload.h"

/* private_data of a file whose handshake is done. */
static const char greeted;

/* Every call begins with its size as the caller knows it: at least that of the first version. */
static int copy_call(void *call, size_t size, void __user *from, size_t least)
{
	u32 theirs;
	int err;

	if (get_user(theirs, (u32 __user *)from))
		return -EFAULT;
	if (theirs < least)
		return -EINVAL;
	if (theirs > PAGE_SIZE)
		return -E2BIG;
	err = copy_struct_from_user(call, size, from, theirs);
	*(u32 *)call = theirs; /* whatever it says by now */
	return err;
}

static int copy_answer(void __user *to, const void *call, size_t size)
{
	u32 theirs = *(const u32 *)call;

	return copy_to_user(to, call, min_t(size_t, size, theirs)) ? -EFAULT : 0;
}

static long handshake(struct file *file, void __user *user)
{
	struct skoff_handshake call;
	int err = copy_call(&call, sizeof(call), user, SKOFF_HANDSHAKE_SIZE);

	if (err)
		return err;
	err = call.version == SKOFF_VERSION ? 0 : -EPROTO;
	call.version = SKOFF_VERSION;
	call.snapshot_size = sizeof(struct skoff_snapshot);
	call.segment_size = sizeof(struct skoff_segment);
	call.kernel = SKOFF_KERNEL;
	call.features = 0;
	if (!err)
		WRITE_ONCE(file->private_data, (void *)&greeted);
	return copy_answer(user, &call, sizeof(call)) ?: err;
}

/* Why this is no socket that can be moved, whatever its state. */
static u32 foreign(const struct sock *sk)
{
	bool inet = sk->sk_family == AF_INET || sk->sk_family == AF_INET6;

	if (inet && sk_is_tcp(sk))
		return SKOFF_REASON_NONE;
	return inet && sk->sk_protocol == IPPROTO_MPTCP ? SKOFF_REASON_MPTCP : SKOFF_REASON_NOT_TCP;
}

/* The socket behind a descriptor, if the caller may move it. */
static struct socket *get_socket(int fd, u32 *reason)
{
	struct socket *sock;
	int err;

	sock = sockfd_lookup(fd, &err);
	if (!sock) {
		*reason = err == -ENOTSOCK ? SKOFF_REASON_NOT_TCP : SKOFF_REASON_NONE;
		return ERR_PTR(*reason ? -EOPNOTSUPP : err);
	}
	*reason = foreign(sock->sk);
	if (*reason)
		err = -EOPNOTSUPP;
	else if (!ns_capable(sock_net(sock->sk)->user_ns, CAP_NET_ADMIN))
		err = -EPERM;
	else
		return sock;
	sockfd_put(sock);
	return ERR_PTR(err);
}

static long freeze_export(void __user *user)
{
	struct skoff_export call;
	struct socket *sock;
	int err = copy_call(&call, sizeof(call), user, SKOFF_EXPORT_SIZE);

	if (err)
		return err;
	if (call.flags & ~SKOFF_OWN)
		return -EINVAL;
	sock = get_socket(call.fd, &call.reason);
	if (IS_ERR(sock)) {
		err = PTR_ERR(sock);
	} else {
		err = skoff_freeze_export(sock, &call);
		sockfd_put(sock);
	}
	return copy_answer(user, &call, sizeof(call)) ?: err;
}

static long import(void __user *user)
{
	struct skoff_import call;
	struct socket *sock;
	int err = copy_call(&call, sizeof(call), user, SKOFF_IMPORT_SIZE);

	if (err)
		return err;
	if (call.flags & ~(SKOFF_BIND | SKOFF_OPTIONS) ||
	    memchr_inv(call.reserved, 0, sizeof(call.reserved)))
		return -EINVAL;
	sock = get_socket(call.fd, &call.reason);
	if (IS_ERR(sock)) {
		err = PTR_ERR(sock);
	} else {
		err = skoff_import_into(sock, &call);
		sockfd_put(sock);
	}
	return copy_answer(user, &call, sizeof(call)) ?: err;
}

/* SKOFF_THAW and SKOFF_ABORT: to the socket they are the same. */
static long thaw(void __user *user)
{
	struct skoff_thaw call;
	struct socket *sock;
	int err = copy_call(&call, sizeof(call), user, SKOFF_THAW_SIZE);

	if (err)
		return err;
	if (call.reserved)
		return -EINVAL;
	sock = get_socket(call.fd, &call.reason);
	if (IS_ERR(sock)) {
		err = PTR_ERR(sock);
		return copy_answer(user, &call, sizeof(call)) ?: err;
	}
	lock_sock(sock->sk);
	if (skoff_is_frozen(sock->sk)) {
		skoff_thaw(sock->sk);
		sk_detach_filter(sock->sk); /* if there is one */
	} else {
		call.reason = SKOFF_REASON_FROZEN;
		err = -EOPNOTSUPP;
	}
	release_sock(sock->sk);
	sockfd_put(sock);
	return copy_answer(user, &call, sizeof(call)) ?: err;
}

static long skoff_ioctl(struct file *file, unsigned int number, unsigned long argument)
{
	void __user *user = (void __user *)argument;

	if (number == SKOFF_HANDSHAKE)
		return handshake(file, user);
	if (READ_ONCE(file->private_data) != &greeted)
		return -EPERM;
	switch (number) {
	case SKOFF_FREEZE_EXPORT:
		return freeze_export(user);
	case SKOFF_IMPORT:
		return import(user);
	case SKOFF_THAW:
	case SKOFF_ABORT:
		return thaw(user);
	}
	return -ENOTTY;
}

static int skoff_open(struct inode *inode, struct file *file)
{
	file->private_data = NULL; /* misc_open() leaves the device there */
	return 0;
}

static const struct file_operations skoff_operations = {
	.owner = THIS_MODULE,
	.open = skoff_open,
	.unlocked_ioctl = skoff_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice skoff_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = SKOFF_DEVICE,
	.fops = &skoff_operations,
	.mode = 0600,
};

module_misc_device(skoff_device);

MODULE_DESCRIPTION("Hand live TCP connections from one socket to another");
MODULE_AUTHOR("Streamlift");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
